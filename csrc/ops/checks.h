// How is bad input refused? Border checks shared by every backend: each names the argument, what was expected and what
// came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>

#include "params.h"

namespace magi {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define MAGI_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline std::string shape_string(torch::headeronly::IntHeaderOnlyArrayRef shape) {
    std::string s = "[";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
    return s + "]";
}
inline std::string shape_string(const Tensor& t) { return shape_string(t.sizes()); }

inline const char* dtype_string(ScalarType t) {
    switch (t) {
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Bool: return "bool";
        default: return "another dtype";
    }
}

inline Dtype float_dtype(ScalarType t, const char* name) {
    switch (t) {
        case ScalarType::Half: return Dtype::kF16;
        case ScalarType::BFloat16: return Dtype::kBF16;
        case ScalarType::Float: return Dtype::kF32;
        case ScalarType::Double: return Dtype::kF64;
        default: STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64, got ", dtype_string(t));
    }
}

// lse, delta, sink and partial results: fp64 for fp64 inputs, fp32 otherwise.
inline ScalarType accumulation_dtype(ScalarType t) {
    return t == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* name) {
    MAGI_CHECK(t.scalar_type() == expected, name, " must have dtype ", dtype_string(expected), ", got ",
               dtype_string(t.scalar_type()));
}

inline void check_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
    MAGI_CHECK(t.device() == like.device(), name, " must be on the device of ", like_name);
}

inline void check_same_shape(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
    bool same = t.dim() == like.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
    MAGI_CHECK(same, name, " must have the shape of ", like_name, ", ", shape_string(like), ", got ", shape_string(t));
}

inline void check_shape(const Tensor& t, std::initializer_list<int64_t> expected, const char* name,
                        const char* meaning) {
    const auto sizes = t.sizes();
    MAGI_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, " must have shape ",
               meaning, " = ", shape_string(expected), ", got ", shape_string(t));
}

inline int row_count(const Tensor& t, const char* name) {
    MAGI_CHECK(t.size(0) < kMaxRows, name, " must have fewer than 2**29 rows, got ", t.size(0));
    return (int)t.size(0);
}

// A new tensor on the device of `like`, with its dtype unless told otherwise. By strides: torch's new_empty goes
// through the dispatcher twice.
inline Tensor make_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
    constexpr size_t kMostDims = 64;
    MAGI_CHECK(shape.size() <= kMostDims, "a tensor must have at most 64 dimensions, got ", shape.size());
    int64_t strides[kMostDims], stride = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(1, shape[i]);
    }
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    const auto type =
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type())));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)shape.size(), shape.data(), strides, type, device,
                                                    like.get_device_index(), &made));
    return Tensor(made);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// [n, width] int32, contiguous and aligned to 8 bytes, which views of part of a tensor may not be.
inline Tensor check_table(const Tensor& t, int64_t width, const char* name) {
    MAGI_CHECK(t.dim() == 2 && t.size(1) == width, name, " must have shape [n, ", width, "], got ", shape_string(t));
    check_dtype(t, ScalarType::Int, name);
    const Tensor table = as_contiguous(t);
    return reinterpret_cast<uintptr_t>(table.data_ptr()) % 8 == 0 ? table : torch::stable::clone(table);
}

// [rows, heads, dim] with any strides but a contiguous last dimension; a copy is made only where that one is strided.
inline Tensor last_contiguous(const Tensor& t) {
    return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

inline Heads heads_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

}  // namespace magi
