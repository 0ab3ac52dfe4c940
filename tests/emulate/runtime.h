// How the emulated device is set and asked, for code that does not include CUDA's language (gpu.h).
#pragma once

#include <cstddef>

namespace emulate {

void set_device(int multiprocessors, int shared_memory);
// Writes where in the library's file the kernels lie that were launched so far; returns how many.
int kernels_launched(size_t* offsets, int room);
void set_images(bool there);  // whether any fits the device
// The number of the current device, what its images were compiled for, how many clusters it says it runs at a time,
// and whether it does.
void set_clusters(int device, int ptx_version, int count, bool launches);
void set_order(unsigned seed);  // of the threads
// Whether the next allocation succeeds; asking counts as one.
bool memory_left();
void set_memory_left(int count);

}  // namespace emulate
