// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The kernels for AVX2 with FMA and F16C (Haswell, Zen and later).
#include "standard_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define GKV_ISA avx2
#define GKV_VECTOR_BYTES 32
#include "kernels.inc.h"
#endif
