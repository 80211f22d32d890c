// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Finds out what the processor can do.
#include "isa.h"

#include <atomic>
#include <vector>

namespace gkv {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512::kernels);
  if (has_avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{supported().front()};
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *active().load(std::memory_order_relaxed); }

std::string supported_isas() {
  std::string names;
  for (const Kernels* kernels : supported())
    names += (names.empty() ? "" : ",") + std::string(kernels->name);
  return names;
}

bool use_isa(const std::string& name) {
  for (const Kernels* kernels : supported())
    if (name == kernels->name) {
      active().store(kernels, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace gkv
