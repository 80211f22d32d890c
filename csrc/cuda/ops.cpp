// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The operators for CUDA, registered with torch over its stable ABI: arguments are checked here,
// once, and kernels go to the current stream. Nothing is read back and nothing is allocated, so all
// of it can be captured in a graph. The schemas stand in gkv_vllm/ops/schemas.py.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "kernels.h"

namespace gkv::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---- arguments

// Everything that is added to an address, as one number whose trailing zeros all of it has.
class Alignment {
 public:
  void add(const void* address) { bits_ |= reinterpret_cast<uintptr_t>(address); }
  void add(int64_t bytes) { bits_ |= static_cast<uintptr_t>(bytes); }
  bool allows(uintptr_t bytes) const { return bits_ % bytes == 0; }

 private:
  uintptr_t bits_ = 0;
};

// Checks tensors of one operator, all on the device of the first.
class Check {
 public:
  Check(const char* op, const Tensor& first) : op_(op) {
    device_ = first.get_device_index();
    type_ = device_type(first);
  }

  void device(const Tensor& x, const char* what) const {
    STD_TORCH_CHECK(device_type(x) == type_ && x.get_device_index() == device_, op_, ": ", what,
                    " must be on the device of the other tensors");
  }

  // Of exactly this size, where it is not negative. Rows may be any distance apart, the entries of
  // a row not.
  void tensor(const Tensor& x, ScalarType type, std::initializer_list<int64_t> size,
              const char* what) const {
    fits(x, type, size, what, false);
  }

  // Of at least as many rows: buffers for the largest batch are passed as they are.
  void buffer(const Tensor& x, ScalarType type, std::initializer_list<int64_t> size,
              const char* what) const {
    fits(x, type, size, what, true);
  }

  int32_t int32(int64_t number, const char* what) const {
    STD_TORCH_CHECK(number >= 0 && number <= std::numeric_limits<int32_t>::max(), op_, ": ", what,
                    " must be from 0 to 2^31 - 1, not ", number);
    return static_cast<int32_t>(number);
  }

  int64_t itemsize(const Tensor& x, const char* what) const {
    const ScalarType type = x.scalar_type();
    const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
    STD_TORCH_CHECK(half || type == ScalarType::Float, op_, ": ", what,
                    " must be float32, bfloat16 or float16");
    return half ? 2 : 4;
  }

  // Whether 16 bytes can be read at once.
  bool wide(const Alignment& alignment) const {
    STD_TORCH_CHECK(alignment.allows(sizeof(Vec4)), op_,
                    ": rows and strides must be multiples of 4 bytes");
    return alignment.allows(sizeof(Vec16));
  }

  void launched(const char* error) const {
    STD_TORCH_CHECK(!error, op_, ": the kernel was not launched: ", error);
  }

  int32_t device_index() const { return device_; }

  static std::string shape_of(const Tensor& x) {
    std::string text = "[";
    for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
    return text + "]";
  }

 private:
  void fits(const Tensor& x, ScalarType type, std::initializer_list<int64_t> size, const char* what,
            bool more_rows) const {
    device(x, what);
    const auto dims = static_cast<int64_t>(size.size());
    bool same = x.scalar_type() == type && x.dim() == dims &&
                (x.numel() == 0 || x.size(dims - 1) == 1 || x.stride(dims - 1) == 1);
    for (int64_t i = 0; same && i < dims; ++i) {
      const int64_t wanted = size.begin()[i], found = x.size(i);
      same = wanted < 0 || found == wanted || (more_rows && i == 0 && found > wanted);
    }
    STD_TORCH_CHECK(same, op_, ": need ", what, ", got ", shape_of(x));
  }

  static int32_t device_type(const Tensor& x) {
    int32_t type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    return type;
  }

  const char* op_;
  int32_t device_;
  int32_t type_;
};

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// The device that a launch goes to, current until the end of the scope, and its stream.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream_));
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  void* stream() const { return stream_; }

 private:
  CUDAGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

// ---- operators

// What lies on the device is the caller's promise, since to look at it would be to wait: ids and
// places within their tensors, and `keep` and the places of targets (fresh ones apart) rising.

void compact_layers(const Tensors& kv_caches, const Tensors& planes, const Tensor& source_ids,
                    const Tensor& target_ids, const Tensor& target_places, const Tensor& keep) {
  const char* op = "compact_layers";
  const auto layers = static_cast<int64_t>(kv_caches.size());
  STD_TORCH_CHECK(layers > 0, op, ": kv_caches must name at least one layer");
  const Tensor& first = kv_caches[0];
  const Check check(op, first);
  STD_TORCH_CHECK(first.dim() == 4 && first.size(3) > 0 && first.size(3) % 2 == 0 &&
                      first.size(2) > 0 && first.stride(3) == 1,
                  op, ": kv_caches must be [num_blocks, kv_heads, block_size, 2 * head_dim], got ",
                  Check::shape_of(first));
  const int64_t num_blocks = first.size(0), heads = first.size(1), block_size = first.size(2);
  const int64_t itemsize = check.itemsize(first, "kv_caches");
  for (const Tensor& cache : kv_caches) {
    check.device(cache, "kv_caches");
    bool same = cache.scalar_type() == first.scalar_type() && cache.dim() == 4;
    for (int64_t i = 0; same && i < 4; ++i)
      same = cache.size(i) == first.size(i) && cache.stride(i) == first.stride(i);
    STD_TORCH_CHECK(same, op, ": all kv_caches must agree in shape, strides and type");
  }
  STD_TORCH_CHECK(planes.empty() || planes.size() == kv_caches.size(), op, ": planes must be empty",
                  " or one for each of the ", layers, " kv_caches, not ", planes.size());
  for (const Tensor& plane : planes) {
    check.tensor(plane, ScalarType::Float, {num_blocks, heads, block_size},
                 "planes [num_blocks, kv_heads, block_size] float32");
    STD_TORCH_CHECK(plane.is_contiguous(), op, ": planes must be contiguous");
  }
  check.tensor(source_ids, ScalarType::Long, {layers, -1}, "source_ids [layers, sources] int64");
  check.tensor(target_ids, ScalarType::Long, {layers, -1}, "target_ids [layers, targets] int64");
  const int64_t targets = target_ids.size(1), survivors = targets * block_size;
  check.tensor(target_places, ScalarType::Int, {layers, targets},
               "target_places [layers, targets] int32");
  check.tensor(keep, ScalarType::Long, {layers, -1, survivors},
               "keep [layers, kv_heads or 1, targets * block_size] int64");
  STD_TORCH_CHECK(keep.size(1) == 1 || keep.size(1) == heads, op,
                  ": keep must be [layers, kv_heads or 1, targets * block_size], got ",
                  Check::shape_of(keep));
  check.int32(source_ids.size(1) * block_size, "the number of source tokens");
  check.int32(num_blocks, "the number of blocks");
  if (survivors == 0 || heads == 0) return;

  Compact x{};
  x.source_stride = source_ids.stride(0);
  x.target_stride = target_ids.stride(0);
  x.place_stride = target_places.stride(0);
  x.keep_layer_stride = keep.stride(0);
  x.keep_head_stride = keep.size(1) == 1 ? 0 : keep.stride(1);
  x.block_stride = first.stride(0) * itemsize;
  x.head_stride = first.stride(1) * itemsize;
  x.token_stride = first.stride(2) * itemsize;
  x.kv_heads = check.int32(heads, "kv_heads");
  x.block_size = check.int32(block_size, "block_size");
  x.num_survivors = check.int32(survivors, "targets * block_size");
  x.row_bytes = check.int32(first.size(3) * itemsize, "2 * head_dim");
  Alignment alignment;
  for (const int64_t bytes : {x.block_stride, x.head_stride, x.token_stride}) alignment.add(bytes);
  alignment.add(x.row_bytes);
  for (const Tensor& cache : kv_caches) alignment.add(cache.data_ptr());
  const bool wide = check.wide(alignment);

  const OnDevice device(check.device_index());
  for (int64_t begin = 0; begin < layers; begin += kLayersPerLaunch) {
    x.num_layers = static_cast<int32_t>(std::min<int64_t>(kLayersPerLaunch, layers - begin));
    for (int64_t i = 0; i < x.num_layers; ++i)
      x.layers[i] = {data<char>(kv_caches[begin + i]),
                     planes.empty() ? nullptr : data<float>(planes[begin + i])};
    x.source_ids = data<int64_t>(source_ids) + begin * x.source_stride;
    x.target_ids = data<int64_t>(target_ids) + begin * x.target_stride;
    x.target_places = data<int32_t>(target_places) + begin * x.place_stride;
    x.keep = data<int64_t>(keep) + begin * x.keep_layer_stride;
    check.launched(launch_compact(x, wide, device.stream()));
  }
}

void prepare_step(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_starts,
                  const Tensor& slots, int64_t block_size, int64_t window, const Tensor& live_table,
                  const Tensor& live_lens, const Tensor& places) {
  const Check check("prepare_step", block_table);
  check.buffer(seq_lens, ScalarType::Int, {-1}, "seq_lens [rows] int32");
  const int64_t rows = seq_lens.size(0);
  check.buffer(block_table, ScalarType::Int, {rows, -1}, "block_table [rows, width] int32");
  check.buffer(query_starts, ScalarType::Int, {rows + 1}, "query_starts [rows + 1] int32");
  check.buffer(slots, ScalarType::Int, {rows}, "slots [rows] int32");
  check.buffer(live_table, ScalarType::Int, {rows, -1}, "live_table [rows, width] int32");
  check.buffer(live_lens, ScalarType::Int, {rows}, "live_lens [rows] int32");
  check.buffer(places, ScalarType::Int, {-1}, "places [tokens] int32");
  STD_TORCH_CHECK(live_table.size(1) >= block_table.size(1), "prepare_step: live_table must have ",
                  block_table.size(1), " columns at least, not ", live_table.size(1));
  STD_TORCH_CHECK(block_size > 0 && window > 0,
                  "prepare_step: block_size and window must be positive");
  Step x{};
  x.block_table = data<int32_t>(block_table);
  x.seq_lens = data<int32_t>(seq_lens);
  x.query_starts = data<int32_t>(query_starts);
  x.slots = data<int32_t>(slots);
  x.live_table = data<int32_t>(live_table);
  x.live_lens = data<int32_t>(live_lens);
  x.places = data<int32_t>(places);
  x.table_stride = block_table.stride(0);
  x.live_stride = live_table.stride(0);
  x.rows = check.int32(rows, "rows");
  x.width = check.int32(block_table.size(1), "the width of block_table");
  x.capacity = check.int32(places.size(0), "the number of places");
  x.block_size = check.int32(block_size, "block_size");
  x.window = check.int32(window, "window");
  const OnDevice device(check.device_index());
  check.launched(launch_prepare_step(x, device.stream()));
}

void store_window_queries(const Tensor& queries, const Tensor& places, const Tensor& ring) {
  const char* op = "store_window_queries";
  const Check check(op, queries);
  check.device(ring, "ring");
  STD_TORCH_CHECK(queries.dim() == 3 && ring.dim() == 3 && ring.is_contiguous() &&
                      queries.scalar_type() == ring.scalar_type() &&
                      queries.size(1) == ring.size(1) && queries.size(2) == ring.size(2) &&
                      queries.stride(2) == 1 &&
                      (queries.size(1) == 1 || queries.stride(1) == queries.size(2)),
                  op, ": queries and ring must both be [tokens, query_heads, head_dim], got ",
                  Check::shape_of(queries), " and ", Check::shape_of(ring));
  check.buffer(places, ScalarType::Int, {queries.size(0)}, "places [tokens] int32");
  const int64_t itemsize = check.itemsize(ring, "ring");
  WindowQueries x{};
  x.queries = data<char>(queries);
  x.places = data<int32_t>(places);
  x.ring = data<char>(ring);
  x.query_stride = queries.stride(0) * itemsize;
  x.tokens = check.int32(queries.size(0), "the number of tokens");
  x.row_bytes = check.int32(ring.size(1) * ring.size(2) * itemsize, "query_heads * head_dim");
  if (x.tokens == 0) return;
  Alignment alignment;
  alignment.add(x.queries);
  alignment.add(x.ring);
  alignment.add(x.query_stride);
  alignment.add(x.row_bytes);
  const OnDevice device(check.device_index());
  check.launched(launch_store_queries(x, check.wide(alignment), device.stream()));
}

}  // namespace
}  // namespace gkv::cuda

// The tests build this file for a machine without a GPU, over launchers that run on the host.
#if defined(GKV_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(gkv_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(gkv, CUDA, m) {
#endif
  m.impl("compact_layers", TORCH_BOX(&gkv::cuda::compact_layers));
  m.impl("prepare_step", TORCH_BOX(&gkv::cuda::prepare_step));
  m.impl("store_window_queries", TORCH_BOX(&gkv::cuda::store_window_queries));
}

// ---- the Python module: nothing but what it was built for

static PyObject* architectures(PyObject*, PyObject*) {
  return PyUnicode_FromString(GKV_ARCHITECTURES);
}

static PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "The GPUs that there is code for: sm_80,sm_90."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
