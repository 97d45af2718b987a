// The whole shim, in the order that its parts need each other.
#pragma once
#include "base.h"
#include "bfloat.h"
#include "vector.h"
#include "math.h"
#include "limits.h"
#include "abi.h"
#ifdef MSL_PASS_REGISTERS
#include "opaque.h"
#else
#pragma clang attribute push(__attribute__((no_sanitize("thread"))), apply_to = function)
#include "worker.h"
#include "fiber.h"
#include "sync.h"
#include "check.h"
#include "simd.h"
#include "matrix_core.h"
#include "atomic.h"
#ifndef MSL_PASS_TYPES
#include "entry.h"
#endif
#pragma clang attribute pop
#include "matrix.h"
#endif
