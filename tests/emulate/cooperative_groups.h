// Of CUDA's cooperative groups: the cluster.
#pragma once

namespace cooperative_groups {

struct cluster_group {
  unsigned num_blocks() const { return emulate::cluster_size(); }
  unsigned block_rank() const { return emulate::cluster_rank(); }
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    emulate::sync_cluster(file, line);
  }
  template <class T>
  T* map_shared_rank(T* p, int rank) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + emulate::to_shared_memory_of(rank));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
