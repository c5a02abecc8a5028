// Everything public, for C++ programs.
#pragma once

#include <rankwise/ops.h>
