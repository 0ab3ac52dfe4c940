// Linear+GELU on Hopper: one CUTLASS kernel, warp-specialised, TMA in and out. Its epilogue adds the bias, stores the
// pre-activation where it is wanted, and applies the GELU of math/gelu.h to the value that is stored, as two calls of
// torch would.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "../math/gelu.h"
#include "kernels.h"

namespace nnfast::cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_256;
using cute::_64;
using cute::Shape;

// The tiles to choose from, and where the choice changes; a measurement should settle both. Two blocks of a cluster
// share their tiles of the weight. Pingpong: two warpgroups, each on its own tile, the epilogue of one under the
// products of the other; a thread then has registers for 192 sums at the most. Cooperative: both on one tile, and
// nothing under the epilogue: a seventh of the time at in = 2048, less beyond; but a larger tile reads an eighth less.
using Pingpong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Huge = Shape<_128, _256, _64>;
using Large = Shape<_128, cute::Int<192>, _64>;
using Medium = Shape<_128, _128, _64>;
using Small = Shape<_64, _128, _64>;
constexpr int kSwizzle = 8;          // rows of tiles that are walked together, so that L2 holds what they share
constexpr int64_t kLargeTiles = 2;   // large tiles for each multiprocessor
constexpr int64_t kMediumTiles = 1;  // medium ones

template <class T, bool Tanh>
struct Activation {
  template <class Value>
  struct Fn;
  template <int N>
  struct Fn<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& z) const {
      // Rounded by two numbers an instruction.
      auto y = cutlass::NumericArrayConverter<float, T, N>{}(cutlass::NumericArrayConverter<T, float, N>{}(z));
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) y[i] = nnfast::gelu<Tanh, float>(y[i]);
      return y;
    }
  };
};

template <class T, bool Tanh, class Tile, class Cluster, class Schedule>
struct Kernel {
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  static constexpr int kAlign = 16 / sizeof(T);
  using EpilogueSchedule = std::conditional_t<
      std::is_same_v<Schedule, Cooperative>, cutlass::epilogue::TmaWarpSpecializedCooperative,
      cutlass::epilogue::TmaWarpSpecialized>;
  using Fusion =
      cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<Row, Activation<T, Tanh>::template Fn, T, float, T, T>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row, kAlign, T, Row, kAlign,
      EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, Row, kAlign, T, Column, kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>>;

  static typename Gemm::Arguments arguments(const LinearGelu& f, int multiprocessors) {
    const int m = static_cast<int>(f.rows), n = static_cast<int>(f.out), k = static_cast<int>(f.in);
    using Stride = typename Gemm::GemmKernel::StrideD;
    const auto by_rows = cutlass::make_cute_packed_stride(Stride{}, {m, n, 1});
    typename Gemm::Arguments a{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const T*>(f.input),
         cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideA{}, {m, k, 1}),
         static_cast<const T*>(f.weight),
         cutlass::make_cute_packed_stride(typename Gemm::GemmKernel::StrideB{}, {n, k, 1})},
        {{}, nullptr, {}, static_cast<T*>(f.output), by_rows}};
    a.epilogue.thread.bias_ptr = static_cast<const T*>(f.bias);
    a.epilogue.thread.aux_ptr = static_cast<T*>(f.pre);  // null: none is written
    a.epilogue.thread.dAux = by_rows;
    a.hw_info.device_id = f.device;
    a.hw_info.sm_count = multiprocessors;
    a.scheduler.max_swizzle_size = kSwizzle;
    return a;
  }
};

int multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// body(kernel, multiprocessors) with the Kernel that serves f.
template <class T, bool Tanh, class Body>
auto with_tile(const LinearGelu& f, Body body) {
  const int count = multiprocessors(f.device);
  const auto tiles = [&](int64_t m, int64_t n) { return (f.rows + m - 1) / m * ((f.out + n - 1) / n); };
  if (f.in >= f.cooperative_in && tiles(128, 256) >= kLargeTiles * count)
    return body(Kernel<T, Tanh, Huge, Shape<_2, _1, _1>, Cooperative>{}, count);
  if (tiles(128, 192) >= kLargeTiles * count) return body(Kernel<T, Tanh, Large, Shape<_2, _1, _1>, Pingpong>{}, count);
  if (tiles(128, 128) >= kMediumTiles * count)
    return body(Kernel<T, Tanh, Medium, Shape<_2, _1, _1>, Pingpong>{}, count);
  return body(Kernel<T, Tanh, Small, Shape<_1, _1, _1>, Pingpong>{}, count);
}

template <class Body>
auto with_kernel(const LinearGelu& f, Body body) {
  using cutlass::bfloat16_t;
  using cutlass::half_t;
  if (f.dtype == DType::bf16)
    return f.tanh ? with_tile<bfloat16_t, true>(f, body) : with_tile<bfloat16_t, false>(f, body);
  return f.tanh ? with_tile<half_t, true>(f, body) : with_tile<half_t, false>(f, body);
}

}  // namespace

int64_t linear_gelu_workspace(const LinearGelu& f) {
  return with_kernel(f, [&](auto kernel, int count) {
    using K = decltype(kernel);
    return static_cast<int64_t>(K::Gemm::get_workspace_size(K::arguments(f, count)));
  });
}

const char* linear_gelu(const LinearGelu& f, void* workspace, cudaStream_t stream) {
  const auto status = with_kernel(f, [&](auto kernel, int count) {
    using K = decltype(kernel);
    typename K::Gemm gemm;
    const auto a = K::arguments(f, count);
    auto status = K::Gemm::can_implement(a);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(a, workspace, stream);
    return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
  });
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace nnfast::cuda
