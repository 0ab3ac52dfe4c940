// The backward of a Linear that reads a GELU, on Hopper: one CUTLASS kernel, warp-specialised, TMA in and out,
// pingpong: the epilogue of one tile under the products of the next. It ends the product for the GELU's gradient with
// the GELU's own backward, of the value that is stored, and with the sums over a tile's rows.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "../math/gelu.h"
#include "device.cuh"

namespace nnfast::cuda {
namespace {

using cute::_1;
using cute::_128;
using cute::_2;
using cute::_64;
using cute::Shape;

// A measurement should settle both. Two blocks of a cluster share their tiles of the weight.
using Tile = Shape<_128, _128, _64>;
using Cluster = Shape<_2, _1, _1>;

// grad_pre = product gelu'(pre), of the product as it is stored in T, and rounded as it is stored in T.
template <class T, bool Tanh>
struct Derivative {
  template <class Value>
  struct Fn;
  template <int N>
  struct Fn<cutlass::Array<float, N>> {
    using Values = cutlass::Array<float, N>;
    CUTLASS_DEVICE Values operator()(const Values& product, const Values& pre) const {
      Values y = rounded(product);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) y[i] *= nnfast::gelu_grad<Tanh, float>(pre[i]);
      return rounded(y);
    }
    CUTLASS_DEVICE static Values rounded(const Values& x) {
      return cutlass::NumericArrayConverter<float, T, N>{}(cutlass::NumericArrayConverter<T, float, N>{}(x));
    }
  };
};

// A node of the epilogue that lets values through and sums them over the rows that a warp has of a tile. Each warp of
// each tile writes a row of `parts`, which has `width` columns, a multiple of the tile's.
struct ColumnSums {
  static constexpr int kWarps = 4;  // of the warpgroup that has a tile, one below the other

  struct SharedStorage {};
  struct Arguments {
    float* parts = nullptr;
    int64_t width = 0;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& a, void*) {
    return a;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(
      const Problem&, const Arguments&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ColumnSums() {}
  CUTLASS_HOST_DEVICE ColumnSums(const Params& params, const SharedStorage&) : params(params) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const cutlass::epilogue::fusion::ProducerLoadArgs<Args...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // Both tensors as a thread's values lie in the tile; all rows of a column are one element.
  template <class Sums, class Part>
  struct Callbacks : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    Sums sums;
    Part part;
    bool inside;

    CUTLASS_DEVICE Callbacks(const Sums& sums, const Part& part, bool inside)
        : sums(sums), part(part), inside(inside) {}

    template <class Accumulator, class Value, int N>
    CUTLASS_DEVICE auto visit(
        const cutlass::Array<Accumulator, N>&, int epi_v, int epi_m, int epi_n,
        const cutlass::Array<Value, N>& values) {
      auto here = sums(cute::_, cute::_, cute::_, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) here(epi_v * N + i) += values[i];
      return values;
    }

    CUTLASS_DEVICE void end() {
      auto each = cute::filter(sums);
      auto out = cute::filter(part);
      const bool first = threadIdx.x % 32 < 4;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < cute::size(each); ++i) {
        // In the matrix instructions' result four threads side by side have the columns of a row, and the next four the
        // same columns of the next row.
        float s = each(i);
        CUTLASS_PRAGMA_UNROLL
        for (int lanes = 16; lanes >= 4; lanes /= 2) s += __shfl_xor_sync(~0u, s, lanes);
        if (first && inside) out(i) = s;
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Args...>& args) {
    static_assert(ReferenceSrc, "values are to lie as in the accumulators");
    const int m = cute::get<0>(args.tile_coord_mnkl), n = cute::get<1>(args.tile_coord_mnkl);
    const int64_t row = int64_t(m) * kWarps + args.thread_idx / 32;
    float* const p = params.parts + row * params.width + int64_t(n) * cute::size<1>(Tile{});
    const auto tile = cute::make_tensor(
        cute::make_gmem_ptr(p), cute::make_layout(cute::take<0, 2>(Tile{}), cute::make_stride(cute::_0{}, cute::_1{})));
    auto part = cutlass::epilogue::fusion::sm90_partition_for_epilogue<ReferenceSrc>(
        tile, args.epi_tile, args.tiled_copy, args.thread_idx);
    auto sums = cute::make_tensor_like<float>(part);
    cute::fill(sums, 0.0f);
    // A cluster may reach beyond the last tile.
    const bool inside = m * cute::size<0>(Tile{}) < cute::get<0>(args.problem_shape_mnkl);
    return Callbacks<decltype(sums), decltype(part)>(sums, part, inside);
  }

  Params params;
};

template <class T, bool Tanh, bool ByColumns>
struct Kernel {
  using Row = cutlass::layout::RowMajor;
  using Weight = std::conditional_t<ByColumns, cutlass::layout::ColumnMajor, Row>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
  static constexpr int kAlign = 16 / sizeof(T);
  static constexpr int kRows = cute::size<0>(Tile{}), kColumns = cute::size<1>(Tile{});
  static constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

  using Descriptor =
      cutlass::epilogue::collective::detail::EpilogueDescriptor<Tile, EpilogueTile, T, T, EpilogueSchedule>;
  using Stored = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, Row, T>;
  using Product = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90AuxStore<
          Stored::Stages, typename Descriptor::EpilogueTile, T, kRound, typename Stored::Stride,
          typename Stored::SmemLayoutAtom, typename Stored::CopyOpR2S, kAlign, /*EnableNullptr=*/false>,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Grad = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Derivative<T, Tanh>::template Fn, float, float, kRound>, Product,
      cutlass::epilogue::fusion::Sm90SrcFetch<T>>;
  // Rows beyond the last are 0, and so add nothing.
  using Summed = cutlass::epilogue::fusion::Sm90EVT<ColumnSums, Grad>;
  using Result = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, T, float, kRound>, Summed>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, float, float, T, Row, kAlign, T,
      Row, kAlign, EpilogueSchedule, Result>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T, Row, kAlign, T, Weight, kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      Shape<int, int, int, int>, Mainloop, Epilogue, cutlass::gemm::PersistentScheduler>>;

  static int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }
  static int64_t parts(int64_t rows) { return (rows + kRows - 1) / kRows * ColumnSums::kWarps; }

  static typename Gemm::Arguments arguments(const GeluLinearBackward& b, float* parts, int multiprocessors) {
    const int m = static_cast<int>(b.rows), n = static_cast<int>(b.in), k = static_cast<int>(b.out);
    using G = typename Gemm::GemmKernel;
    const auto by_rows = cutlass::make_cute_packed_stride(typename G::StrideD{}, {m, n, 1});
    typename Gemm::Arguments a{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<const T*>(b.grad_out), cutlass::make_cute_packed_stride(typename G::StrideA{}, {m, k, 1}),
         static_cast<const T*>(b.weight), cutlass::make_cute_packed_stride(typename G::StrideB{}, {n, k, 1})},
        {{}, static_cast<const T*>(b.pre), by_rows, static_cast<T*>(b.grad_pre), by_rows}};
    // Nested as the tree is: of each operation the arguments of its operands first, its own last.
    typename Product::Arguments product{{}, {static_cast<T*>(b.grad), by_rows}};
    a.epilogue.thread = {{{product, {}, {}}, {parts, padded(b.in)}}, {}};
    a.hw_info.device_id = b.device;
    a.hw_info.sm_count = multiprocessors;
    return a;
  }
};

int multiprocessors(int device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// body(kernel, multiprocessors) with the Kernel that serves b.
template <class Body>
auto with_kernel(const GeluLinearBackward& b, Body body) {
  const int count = multiprocessors(b.device);
  const auto with_type = [&](auto t) {
    using T = decltype(t);
    if (b.tanh) return b.by_columns ? body(Kernel<T, true, true>{}, count) : body(Kernel<T, true, false>{}, count);
    return b.by_columns ? body(Kernel<T, false, true>{}, count) : body(Kernel<T, false, false>{}, count);
  };
  return b.dtype == DType::bf16 ? with_type(cutlass::bfloat16_t{}) : with_type(cutlass::half_t{});
}

}  // namespace

int64_t gelu_linear_parts(const GeluLinearBackward& b) {
  return with_kernel(b, [&](auto kernel, int) { return kernel.parts(b.rows); });
}

int64_t gelu_linear_width(const GeluLinearBackward& b) {
  return with_kernel(b, [&](auto kernel, int) { return kernel.padded(b.in); });
}

int64_t gelu_linear_workspace(const GeluLinearBackward& b) {
  return with_kernel(b, [&](auto kernel, int count) {
    using K = decltype(kernel);
    return static_cast<int64_t>(K::Gemm::get_workspace_size(K::arguments(b, nullptr, count)));
  });
}

const char* gelu_linear_backward(const GeluLinearBackward& b, float* parts, void* workspace, cudaStream_t stream) {
  const auto status = with_kernel(b, [&](auto kernel, int count) {
    using K = decltype(kernel);
    typename K::Gemm gemm;
    const auto a = K::arguments(b, parts, count);
    auto status = K::Gemm::can_implement(a);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(a, workspace, stream);
    return status == cutlass::Status::kSuccess ? gemm.run(stream) : status;
  });
  if (status != cutlass::Status::kSuccess) return cutlass::cutlassGetStatusString(status);
  const auto error =
      sum_parts(parts, gelu_linear_parts(b), gelu_linear_width(b), b.dtype, b.grad_bias, nullptr, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nnfast::cuda
