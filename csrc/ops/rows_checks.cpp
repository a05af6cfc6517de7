// Border of the row-movement ops. Built into both libraries.
#include <vector>

#include "ops/rows.h"

namespace magi {
namespace {

int64_t elements_per_row(const Tensor& t) {
    int64_t n = 1;
    for (int64_t i = 1; i < t.dim(); ++i) n *= t.size(i);
    return n;
}

// Ranges on the host are checked in full; a device's are the caller's promise, since reading them would wait for the
// device.
Tensor check_ranges(const Tensor& ranges, const Tensor& rows_tensor, int64_t num_rows, int64_t total,
                    const char* rows_name, const char* total_name) {
    Tensor table = check_table(ranges, 2, "ranges");
    check_device(ranges, rows_tensor, "ranges", rows_name);
    if (!table.is_cpu()) return table;
    const int* data = (const int*)table.data_ptr();
    int64_t sum = 0;
    for (int64_t i = 0; i < table.size(0); ++i) {
        const int begin = data[2 * i], end = data[2 * i + 1];
        MAGI_CHECK(0 <= begin && begin <= end && end <= num_rows, "ranges[", i, "] must lie within [0, ", num_rows,
                   "), got [", begin, ", ", end, ")");
        sum += end - begin;
    }
    MAGI_CHECK(sum == total, total_name, " must be the rows in ranges, ", sum, ", got ", total);
    return table;
}

Tensor like_with_rows(const Tensor& t, int64_t rows) {
    std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
    shape[0] = rows;
    return make_empty(t, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
}

}  // namespace

GatherCall check_gather(const Tensor& x, const Tensor& ranges, int64_t total) {
    MAGI_CHECK(x.dim() >= 1, "x must have at least one dimension");
    MAGI_CHECK(total >= 0, "total must not be negative, got ", total);
    const Tensor table = check_ranges(ranges, x, x.size(0), total, "x", "total");
    return {as_contiguous(x), table, like_with_rows(x, total), elements_per_row(x)};
}

ScatterCall check_scatter(const Tensor& y, const Tensor& ranges, int64_t rows, const std::string& op) {
    MAGI_CHECK(y.dim() >= 1, "y must have at least one dimension");
    MAGI_CHECK(rows >= 0, "rows must not be negative, got ", rows);
    float_dtype(y.scalar_type(), "y");
    MAGI_CHECK(op == "sum" || op == "mean", "op must be 'sum' or 'mean', got '", op, "'");
    const Tensor table = check_ranges(ranges, y, rows, y.size(0), "y", "the rows of y");
    return {as_contiguous(y), table, like_with_rows(y, rows), elements_per_row(y), op == "mean"};
}

MergeCall check_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
    MAGI_CHECK(out_a.dim() == 3 && out_a.size(2) > 0, "out must have shape [tokens, heads, v_dim], got ",
               shape_string(out_a));
    float_dtype(out_a.scalar_type(), "out");
    float_dtype(out_b.scalar_type(), "out_i");
    const ScalarType acc = accumulation_dtype(out_a.scalar_type());
    MAGI_CHECK(accumulation_dtype(out_b.scalar_type()) == acc, "out_i must accumulate like out, in ", dtype_string(acc),
               ", got ", dtype_string(out_b.scalar_type()));
    check_same_shape(out_b, out_a, "out_i", "out");
    check_shape(lse_a, {out_a.size(0), out_a.size(1)}, "lse", "[tokens, heads]");
    check_shape(lse_b, {out_a.size(0), out_a.size(1)}, "lse_i", "[tokens, heads]");
    check_dtype(lse_a, acc, "lse");
    check_dtype(lse_b, acc, "lse_i");
    for (auto [t, name] : {std::pair{&lse_a, "lse"}, {&out_b, "out_i"}, {&lse_b, "lse_i"}})
        check_device(*t, out_a, name, "out");
    const Tensor a = as_contiguous(out_a), la = as_contiguous(lse_a);
    return {a, la, as_contiguous(out_b), as_contiguous(lse_b), make_empty(a, a.sizes()), make_empty(la, la.sizes())};
}

}  // namespace magi
