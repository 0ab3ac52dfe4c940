#pragma once
#include "CUDAStream.h"

namespace c10::cuda {

enum class CaptureStatus { None, Active };
CaptureStatus currentStreamCaptureStatusMayInitCtx();
struct CUDAStreamCaptureModeGuard {
  explicit CUDAStreamCaptureModeGuard(cudaStreamCaptureMode) {}
};

}  // namespace c10::cuda
