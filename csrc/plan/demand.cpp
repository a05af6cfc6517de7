#include "plan/demand.h"

#include <algorithm>

namespace magi::plan {

Demand demand_of(Slices slices, const Grid& q_grid) {
    const int num_chunks = q_grid.num_chunks();
    Demand out{std::vector<int64_t>(num_chunks, 0), std::vector<int>(num_chunks + 1, 0), {}};

    // Two passes make a flat table without an allocation for each chunk: count the pieces, then place them.
    std::vector<int> cursor(num_chunks + 1, 0);
    for (const Slice& s : slices) {
        if (s.q0 >= s.q1 || s.k0 >= s.k1 || s.lo > s.hi) continue;
        ++cursor[s.q0 / q_grid.chunk];
        --cursor[(s.q1 - 1) / q_grid.chunk + 1];
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
    for (const Slice& s : slices) {
        if (s.q0 >= s.q1 || s.k0 >= s.k1 || s.lo > s.hi) continue;
        int begin = s.q0;
        for (int c = s.q0 / q_grid.chunk; begin < s.q1; ++c) {
            const int end = std::min(q_grid.rows(c).end, s.q1);
            const Range keys = keys_of_rows(s, begin, end);
            if (keys.begin < keys.end) {
                out.needs[cursor[c]++] = keys;
                out.area[c] += area(crop(s, begin, end, s.k0, s.k1));
            }
            begin = end;
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
