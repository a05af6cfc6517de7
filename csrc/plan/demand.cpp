#include "plan/demand.h"

#include <algorithm>
#include <stdexcept>

namespace magi::plan {

Demand demand_of(std::span<const WeightedMask> masks, const Grid& q_grid, int total_k) {
    const int num_chunks = q_grid.num_chunks(), span = total_k + 1;
    if (static_cast<int64_t>(span) * static_cast<int64_t>(masks.size()) >= int64_t{1} << 31) {
        throw std::invalid_argument("masks: too many for their length, their keys must be below 2**31 in all");
    }
    Demand out{
        q_grid.total == total_k, span, {}, std::vector<double>(num_chunks, 0), std::vector<int>(num_chunks + 1, 0), {}};
    double total_weight = 0;
    for (const WeightedMask& mask : masks) total_weight += mask.weight;
    for (const WeightedMask& mask : masks) out.weights.push_back(mask.weight / total_weight);

    // Two passes make a flat table without an allocation for each chunk: count the pieces, then place them.
    const auto is_empty = [](const Slice& s) { return s.q0 >= s.q1 || s.k0 >= s.k1 || s.lo > s.hi; };
    std::vector<int> cursor(num_chunks + 1, 0);
    for (const WeightedMask& mask : masks) {
        for (const Slice& s : mask.slices) {
            if (is_empty(s)) continue;
            ++cursor[s.q0 / q_grid.chunk];
            --cursor[(s.q1 - 1) / q_grid.chunk + 1];
        }
    }
    int pieces = 0, open = 0;
    for (int c = 0; c < num_chunks; ++c) {
        open += cursor[c];
        cursor[c] = pieces;
        pieces += open;
    }
    cursor[num_chunks] = pieces;
    const std::vector<int> start(cursor);
    out.needs.resize(pieces);
    for (size_t m = 0; m < masks.size(); ++m) {
        const int shift = static_cast<int>(m) * span;
        for (const Slice& s : masks[m].slices) {
            if (is_empty(s)) continue;
            int begin = s.q0;
            for (int c = s.q0 / q_grid.chunk; begin < s.q1; ++c) {
                const int end = std::min(q_grid.rows(c).end, s.q1);
                const Range keys = keys_of_rows(s, begin, end);
                if (keys.begin < keys.end) {
                    out.needs[cursor[c]++] = {keys.begin + shift, keys.end + shift};
                    out.area[c] += out.weights[m] * static_cast<double>(area(crop(s, begin, end, s.k0, s.k1)));
                }
                begin = end;
            }
        }
    }
    int kept = 0;
    for (int c = 0; c < num_chunks; ++c) {
        const std::span<Range> of_chunk(out.needs.data() + start[c], out.needs.data() + cursor[c]);
        const int merged = merge_ranges(of_chunk);
        std::copy_n(of_chunk.begin(), merged, out.needs.begin() + kept);
        out.offset[c] = kept;
        kept += merged;
    }
    out.offset[num_chunks] = kept;
    out.needs.resize(kept);
    return out;
}

}  // namespace magi::plan
