// Everything public, for C++ programs.
#pragma once

#include <rankwise/adapter_file.h>
#include <rankwise/adapter_fold.h>
#include <rankwise/analysis.h>
#include <rankwise/checkpoint.h>
#include <rankwise/cpu_path.h>
#include <rankwise/directions.h>
#include <rankwise/linear_group.h>
#include <rankwise/module_adapters.h>
#include <rankwise/nn.h>
#include <rankwise/nn_linear_group.h>
#include <rankwise/ops.h>
#include <rankwise/optim.h>
#include <rankwise/rank_advice.h>
#include <rankwise/rank_allocator.h>
#include <rankwise/spectral_allocator.h>
#include <rankwise/tensor_file.h>
#include <rankwise/tensor_memory.h>
