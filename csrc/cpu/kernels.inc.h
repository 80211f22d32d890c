// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// All kernels of one instruction set. A file that includes this has included standard_headers.h,
// said what the compiler may use, and defined GKV_ISA and GKV_VECTOR_BYTES.

namespace gkv::GKV_ISA {
namespace {

#include "simd.h"
#include "tiles.h"
//
#include "attention_mass.h"
#include "compact.h"
#include "local_scores.h"
#include "redundancy.h"
#include "selection.h"

}  // namespace

#define GKV_STRING(x) #x
#define GKV_NAME(x) GKV_STRING(x)
#define GKV_EACH(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}

const Kernels kernels = {
    GKV_NAME(GKV_ISA),
    GKV_EACH(local_scores),
    GKV_EACH(redundancy),
    GKV_EACH(superseded),
    GKV_EACH(key_norms),
    compact,
    topk_keep,
    block_max,
    GKV_EACH(attention_mass),
};

}  // namespace gkv::GKV_ISA
