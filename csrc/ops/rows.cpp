// Row movement and merging on the CPU.
#include "ops/rows.h"

#include <torch/csrc/stable/library.h>

#include "cpu/cpu.h"

namespace magi {
namespace {

Tensor range_gather(const Tensor& x, const Tensor& ranges, int64_t total) {
    GatherCall call = check_gather(x, ranges, total);
    cpu::range_gather((const char*)call.x.data_ptr(), (char*)call.out.data_ptr(),
                      call.row_elements * (int64_t)x.element_size(), (const cpu::RowRange*)call.ranges.data_ptr(),
                      call.ranges.size(0));
    return call.out;
}

Tensor range_scatter_reduce(const Tensor& y, const Tensor& ranges, int64_t rows, const std::string& op) {
    ScatterCall call = check_scatter(y, ranges, rows, op);
    cpu::range_scatter_reduce(float_dtype(y.scalar_type(), "y"), call.y.data_ptr(), call.out.data_ptr(), rows,
                              call.row_elements, (const cpu::RowRange*)call.ranges.data_ptr(), call.ranges.size(0),
                              call.mean ? cpu::Reduce::kMean : cpu::Reduce::kSum);
    return call.out;
}

std::tuple<Tensor, Tensor> merge_partials(const Tensor& out, const Tensor& lse, const Tensor& out_i,
                                          const Tensor& lse_i) {
    MergeCall call = check_merge(out, lse, out_i, lse_i);
    cpu::merge_partials(float_dtype(out.scalar_type(), "out"), call.out_a.data_ptr(), call.lse_a.data_ptr(),
                        float_dtype(out_i.scalar_type(), "out_i"), call.out_b.data_ptr(), call.lse_b.data_ptr(),
                        call.out.data_ptr(), call.lse.data_ptr(), out.size(0) * out.size(1), (int)out.size(2));
    return {call.out, call.lse};
}

}  // namespace
}  // namespace magi

STABLE_TORCH_LIBRARY_IMPL(magi, CPU, m) {
    m.impl("range_gather", TORCH_BOX(&magi::range_gather));
    m.impl("range_scatter_reduce", TORCH_BOX(&magi::range_scatter_reduce));
    m.impl("merge_partials", TORCH_BOX(&magi::merge_partials));
}
