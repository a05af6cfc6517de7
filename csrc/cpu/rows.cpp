// Row movement, merging and the backward's row sums on the CPU: memory-bound loops over rows, split between threads.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace magi::cpu {

void range_gather(const char* src, char* dst, int64_t row_bytes, const RowRange* ranges, int64_t num_ranges) {
    std::vector<int64_t> first(num_ranges + 1, 0);
    for (int64_t i = 0; i < num_ranges; ++i) first[i + 1] = first[i] + ranges[i].end - ranges[i].begin;
    const int64_t total = first[num_ranges];
    const int64_t grain = 1 + (1 << 18) / (row_bytes + 1);
    parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
        int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (int64_t row = begin; row < end; ++i) {
            const int64_t stop = std::min(end, first[i + 1]);
            if (stop <= row) continue;
            std::memcpy(dst + row * row_bytes, src + (ranges[i].begin + row - first[i]) * row_bytes,
                        (stop - row) * row_bytes);
            row = stop;
        }
    });
}

namespace {

template <class T>
void scatter_reduce(const T* src, T* dst, int64_t num_rows, int64_t row_elements, const RowRange* ranges,
                    int64_t num_ranges, Reduce op) {
    using Acc = acc_t<T>;
    // The source positions of each row, in order (CSR): every row is then summed once, by one thread, in a fixed order.
    std::vector<int64_t> first(num_rows + 1, 0), position;
    for (int64_t i = 0; i < num_ranges; ++i)
        for (int row = ranges[i].begin; row < ranges[i].end; ++row) ++first[row + 1];
    for (int64_t row = 0; row < num_rows; ++row) first[row + 1] += first[row];
    position.resize(first[num_rows]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    int64_t p = 0;
    for (int64_t i = 0; i < num_ranges; ++i)
        for (int row = ranges[i].begin; row < ranges[i].end; ++row) position[next[row]++] = p++;

    parallel_for(0, num_rows, 1 + (1 << 16) / (row_elements + 1), [&](int64_t begin, int64_t end) {
        std::vector<Acc> sum(row_elements);
        for (int64_t row = begin; row < end; ++row) {
            T* out = dst + row * row_elements;
            const int64_t count = first[row + 1] - first[row];
            if (count == 1) {
                std::memcpy(out, src + position[first[row]] * row_elements, row_elements * sizeof(T));
                continue;
            }
            std::fill(sum.begin(), sum.end(), Acc(0));
            for (int64_t j = first[row]; j < first[row + 1]; ++j) {
                const T* in = src + position[j] * row_elements;
                for (int64_t e = 0; e < row_elements; ++e) sum[e] += to_acc(in[e]);
            }
            const Acc factor = op == Reduce::kMean && count > 0 ? Acc(1) / Acc(count) : Acc(1);
            for (int64_t e = 0; e < row_elements; ++e) out[e] = from_acc<T>(sum[e] * factor);
        }
    });
}

template <class A, class B>
void merge(const A* out_a, const acc_t<A>* lse_a, const B* out_b, const acc_t<A>* lse_b, A* out, acc_t<A>* lse,
           int64_t num_rows, int dim) {
    using Acc = acc_t<A>;
    constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
    parallel_for(0, num_rows, 1 + (1 << 15) / dim, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const Acc a = lse_a[row], b = lse_b[row], most = std::max(a, b);
            // Two empty rows: -inf - (-inf) would be NaN.
            const Acc weight_a = most == kNone ? 0 : std::exp(a - most),
                      weight_b = most == kNone ? 0 : std::exp(b - most);
            const Acc sum = weight_a + weight_b, inverse = sum > 0 ? 1 / sum : 0;
            lse[row] = most == kNone ? kNone : most + std::log(sum);
            for (int64_t e = row * dim; e < (row + 1) * dim; ++e)
                out[e] = from_acc<A>(Acc(to_acc(out_a[e])) * (weight_a * inverse) +
                                     Acc(to_acc(out_b[e])) * (weight_b * inverse));
        }
    });
}

template <class T>
void delta_rows(int num_rows, int num_heads, int dim, const Heads& dout, const Heads& out, const acc_t<T>* dlse,
                acc_t<T>* delta) {
    parallel_for(0, (int64_t)num_rows * num_heads, 1 + (1 << 15) / dim, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / num_heads, head = i % num_heads;
            const T* a = (const T*)dout.data + row * dout.row_stride + head * dout.head_stride;
            const T* b = (const T*)out.data + row * out.row_stride + head * out.head_stride;
            acc_t<T> sum = 0;
            for (int e = 0; e < dim; ++e) sum += to_acc(a[e]) * to_acc(b[e]);
            delta[i] = sum - (dlse ? dlse[i] : 0);
        }
    });
}

}  // namespace

void range_scatter_reduce(Dtype dtype, const void* src, void* dst, int64_t num_rows, int64_t row_elements,
                          const RowRange* ranges, int64_t num_ranges, Reduce op) {
    dispatch(dtype, [&]<class T>(T) {
        scatter_reduce((const T*)src, (T*)dst, num_rows, row_elements, ranges, num_ranges, op);
    });
}

void merge_partials(Dtype dtype_a, const void* out_a, const void* lse_a, Dtype dtype_b, const void* out_b,
                    const void* lse_b, void* out, void* lse, int64_t num_rows, int dim) {
    dispatch(dtype_a, [&]<class A>(A) {
        dispatch(dtype_b, [&]<class B>(B) {
            using Acc = acc_t<A>;
            if constexpr (std::is_same_v<Acc, acc_t<B>>)
                merge((const A*)out_a, (const Acc*)lse_a, (const B*)out_b, (const Acc*)lse_b, (A*)out, (Acc*)lse,
                      num_rows, dim);
        });
    });
}

void ffa_delta(Dtype dtype, int num_rows, int num_heads, int dim, const Heads& dout, const Heads& out, const void* dlse,
               void* delta) {
    dispatch(dtype, [&]<class T>(T) {
        delta_rows<T>(num_rows, num_heads, dim, dout, out, (const acc_t<T>*)dlse, (acc_t<T>*)delta);
    });
}

}  // namespace magi::cpu
