// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the gkv_vllm project
// Which instruction set runs: the widest that this machine has, or the one that was asked for.
#pragma once

#include <string>

#include "kernels.h"

namespace gkv {

// The kernels that run from now on.
const Kernels& active_kernels();

// Names of what this machine can run, comma-separated, widest first.
std::string supported_isas();

// Run this one. False, and nothing changes, where the machine does not have it.
bool use_isa(const std::string& name);

}  // namespace gkv
