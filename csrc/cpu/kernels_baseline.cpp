// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The kernels for any machine: vectors of 16 bytes, which x86-64 and arm64 always have.
#include "standard_headers.h"

#define GKV_ISA baseline
#define GKV_VECTOR_BYTES 16
#include "kernels.inc.h"
