// How does CPU code read and write an element? Storage types, their accumulators, dispatch over dtypes, and threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "params.h"

namespace magi::cpu {

using f16 = torch::headeronly::Half;
using bf16 = torch::headeronly::BFloat16;

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline acc_t<T> to_acc(T x) {
    return static_cast<acc_t<T>>(x);
}
template <class T>
inline T from_acc(acc_t<T> x) {
    return static_cast<T>(x);
}

// body(T{}) for the storage type of dtype.
template <class Body>
inline void dispatch(Dtype dtype, const Body& body) {
    switch (dtype) {
        case Dtype::kF16: return body(f16{});
        case Dtype::kBF16: return body(bf16{});
        case Dtype::kF32: return body(float{});
        case Dtype::kF64: return body(double{});
    }
}

// body(begin, end) over [begin, end) on torch's threads, at least grain items each.
template <class Body>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
    if (begin < end) torch::stable::parallel_for(begin, end, grain, body);
}

}  // namespace magi::cpu
