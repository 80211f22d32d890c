// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The operators for CPU, registered with torch over its stable ABI: arguments are checked here,
// once, and the work is dealt out to torch's threads. The schemas stand in gkv_vllm/ops/schemas.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace gkv {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- arguments

DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
}

void check_dense(const Tensor& tensor, ScalarType type, int64_t dims, const char* op,
                 const char* what) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dims && tensor.is_contiguous(),
                  op, ": need a contiguous tensor for ", what);
}

PagedCache cache_of(const Tensor& kv_cache, const char* op) {
  STD_TORCH_CHECK(kv_cache.dim() == 4, op,
                  ": kv_cache must be [blocks, kv_heads, block_size, 2 * head_dim]");
  const int64_t heads = kv_cache.size(1), block_size = kv_cache.size(2), width = kv_cache.size(3);
  STD_TORCH_CHECK(kv_cache.stride(3) == 1 && kv_cache.stride(2) == width &&
                      kv_cache.stride(1) == block_size * width,
                  op, ": each block of kv_cache must be contiguous");
  STD_TORCH_CHECK(block_size % kTile == 0, op, ": the C++ operators take blocks of a multiple of ",
                  kTile, " tokens, not ", block_size, "; set impl=reference");
  const int64_t itemsize = dtype_of(kv_cache, op, "kv_cache") == kFloat32 ? 4 : 2;
  return {static_cast<char*>(kv_cache.data_ptr()),
          itemsize,
          kv_cache.stride(0),
          heads,
          block_size,
          width / 2};
}

template <class Index>
void check_ids(const Index* ids, int64_t count, int64_t num_blocks, const char* op) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < num_blocks, op, ": block id ", ids[i],
                    " is not one of the cache's ", num_blocks, " blocks");
}

const int64_t* ids_of(const Tensor& ids, int64_t num_blocks, const char* op, const char* what) {
  check_dense(ids, ScalarType::Long, 1, op, what);
  const auto* data = static_cast<const int64_t*>(ids.data_ptr());
  check_ids(data, ids.size(0), num_blocks, op);
  return data;
}

LiveKeys live_keys(const Tensor& kv_cache, const Tensor& block_ids, int64_t live_tokens,
                   const char* op) {
  const PagedCache cache = cache_of(kv_cache, op);
  const int64_t* ids = ids_of(block_ids, kv_cache.size(0), op, "block_ids [blocks] int64");
  STD_TORCH_CHECK(live_tokens > 0 && live_tokens <= block_ids.size(0) * cache.block_size, op, ": ",
                  live_tokens, " live tokens do not fit ", block_ids.size(0), " blocks");
  return {cache, ids, live_tokens};
}

float* plane_of(const Tensor& plane, const Tensor& kv_cache, const char* op) {
  check_dense(plane, ScalarType::Float, 3, op, "plane [blocks, kv_heads, block_size] float32");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(plane.size(i) == kv_cache.size(i), op, ": plane does not fit kv_cache");
  return static_cast<float*>(plane.data_ptr());
}

Tensor new_floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

template <class Work>
void for_tasks(int64_t tasks, const Work& work) {
  if (tasks == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, tasks, 1, work);
}

// ---- operators

Form form_of(const std::string& name) {
  if (name == "max_probability") return Form::kMaxProbability;
  if (name == "max_logit") return Form::kMaxLogit;
  STD_TORCH_CHECK(name == "mean_probability", "local_scores: unknown form '", name, "'");
  return Form::kMeanProbability;
}

Tensor local_scores(const Tensor& queries, const Tensor& kv_cache, const Tensor& block_ids,
                    int64_t live_tokens, double scale, double softcap, std::string form) {
  const char* op = "local_scores";
  const LiveKeys keys = live_keys(kv_cache, block_ids, live_tokens, op);
  const DType type = dtype_of(kv_cache, op, "kv_cache");
  const int64_t heads = keys.cache.kv_heads;
  STD_TORCH_CHECK(queries.dim() == 3 && queries.scalar_type() == kv_cache.scalar_type() &&
                      queries.size(2) == keys.cache.head_dim && queries.stride(2) == 1,
                  op, ": queries must be [query_heads, window, head_dim] of the cache's type");
  STD_TORCH_CHECK(queries.size(0) % heads == 0, op, ": ", queries.size(0),
                  " query heads do not share ", heads, " KV heads");
  const LocalScores x{keys,
                      static_cast<const char*>(queries.data_ptr()),
                      queries.stride(0),
                      queries.stride(1),
                      queries.size(0) / heads,
                      queries.size(1),
                      static_cast<float>(scale),
                      static_cast<float>(softcap),
                      form_of(form)};
  STD_TORCH_CHECK(x.window > 0 && x.older() >= 0, op, ": a window of ", x.window,
                  " queries does not fit ", live_tokens, " tokens");
  Tensor out = new_floats(kv_cache, {heads, x.older()});
  const int64_t chunks = x.num_chunks(), size = heads * x.older();
  const auto kernel = active_kernels().local_scores[type];
  std::vector<float> partial(chunks > 1 ? chunks * size : 0);
  float* sums = chunks > 1 ? partial.data() : floats(out);
  for_tasks(chunks * heads, [&](int64_t begin, int64_t end) { kernel(x, sums, begin, end); });
  for (int64_t i = 0; chunks > 1 && i < size; ++i) {
    float total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += sums[c * size + i];
    floats(out)[i] = total;
  }
  return out;
}

void check_start(int64_t start, const LiveKeys& keys, const char* op) {
  STD_TORCH_CHECK(start >= 0 && start < keys.tokens && start % keys.cache.block_size == 0, op,
                  ": start=", start, " must be a multiple of the block size below live_tokens");
}

Tensor redundancy(const Tensor& kv_cache, const Tensor& block_ids, int64_t start,
                  int64_t live_tokens, double threshold, bool within_blocks) {
  const char* op = "redundancy";
  const LiveKeys keys = live_keys(kv_cache, block_ids, live_tokens, op);
  check_start(start, keys, op);
  STD_TORCH_CHECK(threshold > -1 && threshold <= 1, op, ": threshold must be a cosine");
  Tensor out = new_floats(kv_cache, {keys.cache.kv_heads, live_tokens - start});
  const Redundancy x{keys, start, static_cast<float>(threshold), within_blocks, floats(out)};
  const auto kernel = active_kernels().redundancy[dtype_of(kv_cache, op, "kv_cache")];
  for_tasks(keys.cache.kv_heads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  return out;
}

Tensor superseded(const Tensor& kv_cache, const Tensor& block_ids, int64_t start,
                  int64_t live_tokens) {
  const char* op = "superseded";
  const LiveKeys keys = live_keys(kv_cache, block_ids, live_tokens, op);
  check_start(start, keys, op);
  Tensor out = new_floats(kv_cache, {keys.cache.kv_heads, live_tokens - start});
  const Superseded x{keys, start, floats(out)};
  const auto kernel = active_kernels().superseded[dtype_of(kv_cache, op, "kv_cache")];
  for_tasks(keys.cache.kv_heads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  return out;
}

Tensor key_norms(const Tensor& kv_cache, const Tensor& block_ids, int64_t live_tokens) {
  const char* op = "key_norms";
  const LiveKeys keys = live_keys(kv_cache, block_ids, live_tokens, op);
  Tensor out = new_floats(kv_cache, {keys.cache.kv_heads, live_tokens});
  const KeyNorms x{keys, floats(out)};
  const auto kernel = active_kernels().key_norms[dtype_of(kv_cache, op, "kv_cache")];
  for_tasks(keys.cache.kv_heads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  return out;
}

Tensor block_max(const Tensor& scores, int64_t block_size) {
  const char* op = "block_max";
  const int64_t dims = scores.dim(), width = dims ? scores.size(dims - 1) : 0;
  check_dense(scores, ScalarType::Float, std::max<int64_t>(dims, 1), op, "scores [..., tokens]");
  STD_TORCH_CHECK(block_size > 0 && width % block_size == 0, op, ": ", width,
                  " scores are no whole blocks of ", block_size);
  std::vector<int64_t> size(scores.sizes().begin(), scores.sizes().end());
  size.back() = width / block_size;
  Tensor out = new_floats(scores, size);
  const BlockMax x{floats(scores), block_size, floats(out)};
  active_kernels().block_max(x, 0, out.numel());
  return out;
}

Tensor topk_keep(const Tensor& scores, int64_t count) {
  const char* op = "topk_keep";
  const int64_t dims = scores.dim(), units = dims ? scores.size(dims - 1) : 0;
  check_dense(scores, ScalarType::Float, std::max<int64_t>(dims, 1), op, "scores [..., units]");
  STD_TORCH_CHECK(count >= 0 && count <= units, op, ": cannot keep ", count, " of ", units,
                  " units");
  std::vector<int64_t> size(scores.sizes().begin(), scores.sizes().end());
  size.back() = count;
  Tensor out = torch::stable::new_empty(scores, size, ScalarType::Long);
  if (!out.numel()) return out;
  const TopK x{floats(scores), units, count, static_cast<int64_t*>(out.data_ptr())};
  const auto kernel = active_kernels().topk_keep;
  for_tasks(out.numel() / count, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  return out;
}

void compact(const Tensor& kv_cache, const std::optional<Tensor>& plane, const Tensor& source_ids,
             const Tensor& target_ids, const Tensor& keep) {
  const char* op = "compact";
  const PagedCache cache = cache_of(kv_cache, op);
  const int64_t* sources = ids_of(source_ids, kv_cache.size(0), op, "source_ids [blocks] int64");
  const int64_t* targets = ids_of(target_ids, kv_cache.size(0), op, "target_ids [blocks] int64");
  const int64_t count = target_ids.size(0) * cache.block_size;
  STD_TORCH_CHECK(keep.scalar_type() == ScalarType::Long && keep.dim() == 2 &&
                      keep.size(1) == count && (count == 0 || keep.stride(1) == 1) &&
                      (keep.size(0) == 1 || keep.size(0) == cache.kv_heads),
                  op, ": keep must be [kv_heads or 1, ", count, "] int64");
  const auto* places = static_cast<const int64_t*>(keep.data_ptr());
  const int64_t stride = keep.size(0) == 1 ? 0 : keep.stride(0);
  const int64_t limit = source_ids.size(0) * cache.block_size;
  for (int64_t row = 0; row < keep.size(0); ++row)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t least = i ? places[row * stride + i - 1] + 1 : 0;
      STD_TORCH_CHECK(places[row * stride + i] >= least && places[row * stride + i] < limit, op,
                      ": keep must name ascending places among the source tokens");
    }
  const Compact x{cache,   plane ? plane_of(*plane, kv_cache, op) : nullptr,
                  sources, source_ids.size(0),
                  targets, target_ids.size(0),
                  places,  stride};
  const auto kernel = active_kernels().compact;
  for_tasks(cache.kv_heads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
}

void attention_mass(const Tensor& queries, const Tensor& kv_cache, const Tensor& plane,
                    const Tensor& live_table, const Tensor& live_lens, const Tensor& query_starts,
                    const Tensor& protected_tokens, double scale, double softcap) {
  const char* op = "attention_mass";
  const PagedCache cache = cache_of(kv_cache, op);
  STD_TORCH_CHECK(queries.dim() == 3 && queries.scalar_type() == kv_cache.scalar_type() &&
                      queries.size(2) == cache.head_dim && queries.stride(2) == 1 &&
                      queries.size(1) % cache.kv_heads == 0,
                  op, ": queries must be [tokens, query_heads, head_dim] of the cache's type");
  const int64_t requests = live_lens.size(0);
  check_dense(live_lens, ScalarType::Int, 1, op, "live_lens [requests] int32");
  check_dense(query_starts, ScalarType::Int, 1, op, "query_starts [requests + 1] int32");
  check_dense(protected_tokens, ScalarType::Int, 1, op, "protected [requests] int32");
  STD_TORCH_CHECK(live_table.scalar_type() == ScalarType::Int && live_table.dim() == 2 &&
                      live_table.stride(1) == 1 && live_table.size(0) >= requests &&
                      query_starts.size(0) >= requests + 1 && protected_tokens.size(0) >= requests,
                  op,
                  ": live_table must be [requests, blocks] int32, with as many rows as the rest");
  const auto ints = [](const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); };
  const AttentionMass x{cache,
                        plane_of(plane, kv_cache, op),
                        static_cast<const char*>(queries.data_ptr()),
                        queries.stride(0),
                        queries.stride(1),
                        queries.size(1) / cache.kv_heads,
                        ints(live_table),
                        live_table.stride(0),
                        ints(live_lens),
                        ints(query_starts),
                        ints(protected_tokens),
                        static_cast<float>(scale),
                        static_cast<float>(softcap)};
  for (int64_t row = 0; row < requests; ++row) {
    if (x.protected_tokens[row] < 0) continue;
    const int64_t blocks = (x.live_lens[row] + cache.block_size - 1) / cache.block_size;
    const int64_t count = x.query_starts[row + 1] - x.query_starts[row];
    STD_TORCH_CHECK(blocks <= live_table.size(1) && count <= x.live_lens[row] &&
                        x.query_starts[row + 1] <= queries.size(0),
                    op, ": row ", row, " has more tokens than its table or its queries");
    check_ids(x.live_table + row * x.table_stride, blocks, kv_cache.size(0), op);
  }
  const auto kernel = active_kernels().attention_mass[dtype_of(kv_cache, op, "kv_cache")];
  for_tasks(requests * cache.kv_heads, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
}

void store_window_queries(const Tensor& queries, const Tensor& places, const Tensor& ring) {
  const char* op = "store_window_queries";
  const int64_t width = ring.size(1) * ring.size(2), count = queries.size(0);
  STD_TORCH_CHECK(queries.dim() == 3 && ring.dim() == 3 && ring.is_contiguous() &&
                      queries.scalar_type() == ring.scalar_type() &&
                      queries.size(1) == ring.size(1) && queries.size(2) == ring.size(2) &&
                      queries.stride(2) == 1 && queries.stride(1) == queries.size(2),
                  op, ": queries and ring must both be [tokens, query_heads, head_dim]");
  check_dense(places, ScalarType::Int, 1, op, "places [tokens] int32");
  STD_TORCH_CHECK(places.size(0) >= count, op, ": as many places as queries");
  const int64_t itemsize = dtype_of(ring, op, "ring") == kFloat32 ? 4 : 2;
  const auto* from = static_cast<const char*>(queries.data_ptr());
  auto* to = static_cast<char*>(ring.data_ptr());
  const auto* place = static_cast<const int32_t*>(places.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (place[i] < 0) continue;
    STD_TORCH_CHECK(place[i] < ring.size(0), op, ": place ", place[i], " is outside the ring");
    std::memcpy(to + place[i] * width * itemsize, from + i * queries.stride(0) * itemsize,
                width * itemsize);
  }
}

// The third result says how many rows have holes; without any the others are empty.
std::tuple<Tensor, Tensor, int64_t> squeeze_live_table(const Tensor& block_table,
                                                       const Tensor& seq_lens, int64_t block_size) {
  const char* op = "squeeze_live_table";
  check_dense(seq_lens, ScalarType::Int, 1, op, "seq_lens [requests] int32");
  const int64_t requests = seq_lens.size(0);
  STD_TORCH_CHECK(block_table.scalar_type() == ScalarType::Int && block_table.dim() == 2 &&
                      block_table.stride(1) == 1 && block_table.size(0) >= requests &&
                      block_size > 0,
                  op, ": need block_table [requests, blocks] int32 and a block size");
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t stride = block_table.stride(0);
  const auto used = [&](int64_t row) { return (lens[row] + block_size - 1) / block_size; };
  int64_t columns = 0, with_holes = 0;
  for (int64_t row = 0; row < requests; ++row) {
    STD_TORCH_CHECK(used(row) <= block_table.size(1), op, ": row ", row,
                    " is longer than its table");
    columns = std::max(columns, used(row));
    with_holes += std::count(table + row * stride, table + row * stride + used(row), 0) > 0;
  }
  const std::vector<int64_t> none{0};
  if (!with_holes)
    return {torch::stable::new_empty(block_table, none), torch::stable::new_empty(seq_lens, none),
            0};
  Tensor live = torch::stable::new_empty(block_table, {requests, columns});
  Tensor live_lens = torch::stable::new_empty(seq_lens, {requests});
  auto* out = static_cast<int32_t*>(live.data_ptr());
  auto* out_lens = static_cast<int32_t*>(live_lens.data_ptr());
  for (int64_t row = 0; row < requests; ++row, out += columns) {
    const int32_t* ids = table + row * stride;
    int64_t place = 0;
    for (int64_t i = 0; i < used(row); ++i) {
      out[place] = ids[i];
      place += ids[i] != 0;
    }
    std::fill(out + place, out + columns, 0);
    out_lens[row] = static_cast<int32_t>(lens[row] - (used(row) - place) * block_size);
  }
  return {live, live_lens, with_holes};
}

}  // namespace
}  // namespace gkv

STABLE_TORCH_LIBRARY_IMPL(gkv, CPU, m) {
  m.impl("local_scores", TORCH_BOX(&gkv::local_scores));
  m.impl("redundancy", TORCH_BOX(&gkv::redundancy));
  m.impl("superseded", TORCH_BOX(&gkv::superseded));
  m.impl("key_norms", TORCH_BOX(&gkv::key_norms));
  m.impl("block_max", TORCH_BOX(&gkv::block_max));
  m.impl("topk_keep", TORCH_BOX(&gkv::topk_keep));
  m.impl("compact", TORCH_BOX(&gkv::compact));
  m.impl("attention_mass", TORCH_BOX(&gkv::attention_mass));
  m.impl("store_window_queries", TORCH_BOX(&gkv::store_window_queries));
  m.impl("squeeze_live_table", TORCH_BOX(&gkv::squeeze_live_table));
}

// ---- the Python module: nothing but the instruction set

static PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(gkv::active_kernels().name);
}

static PyObject* supported_isas(PyObject*, PyObject*) {
  return PyUnicode_FromString(gkv::supported_isas().c_str());
}

static PyObject* use_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool done = gkv::use_isa(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!done)
    return PyErr_Format(PyExc_ValueError, "this machine does not run %R; it runs %s", name,
                        gkv::supported_isas().c_str());
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set that runs."},
    {"supported_isas", supported_isas, METH_NOARGS, "Those that this machine has, widest first."},
    {"use_isa", use_isa, METH_O, "Run this one from now on."},
    {nullptr, nullptr, 0, nullptr},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
