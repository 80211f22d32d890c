// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The kernels for AVX-512 with byte and word instructions (Skylake-SP, Zen 4 and later).
#include "standard_headers.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define GKV_ISA avx512
#define GKV_VECTOR_BYTES 64
#include "kernels.inc.h"
#endif
