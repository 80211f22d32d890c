// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// The launchers, which ops.cpp calls after its checks: compact.cu and step.cu, or their stand-ins
// on the host (tests/csrc). Each returns what went wrong, or nullptr.
#pragma once

#include "compact.h"
#include "step.h"

namespace gkv::cuda {

// Whether rows are read in vectors of 16 bytes; everything that is added to an address must allow
// it.
const char* launch_compact(const Compact& x, bool wide, void* stream);
const char* launch_prepare_step(const Step& x, void* stream);
const char* launch_store_queries(const WindowQueries& x, bool wide, void* stream);

}  // namespace gkv::cuda
