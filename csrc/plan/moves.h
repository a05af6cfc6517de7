// Which cells are computed away from the owner of their row?
#pragma once

#include <algorithm>
#include <climits>

#include "plan/grid.h"

namespace magi::plan {

// Cells of [q0, q1) x [k0, k1) are computed by `rank`: rows that it does not own visit it as guests, and what it finds
// goes back to their owner.
struct Move {
    int q0, q1, k0, k1, rank;
};

// Disjoint moves, arranged in bands of rows: every slice splits by who computes what in it.
class Moves {
  public:
    Moves() = default;
    // Throws std::invalid_argument where two moves share a cell or one is no rectangle of this grid.
    Moves(std::span<const Move> moves, int total_q, int total_k, int world);

    // Calls visit(part, rank) for every part of the slice; what no move names is its owner's.
    template <typename Visit>
    void split(const Slice& s, int owner, Visit visit) const {
        if (cuts_.empty()) return visit(s, owner);
        int band = static_cast<int>(std::upper_bound(cuts_.begin(), cuts_.end(), s.q0) - cuts_.begin()) - 1;
        for (int begin = s.q0, end; begin < s.q1; begin = end, ++band) {
            end = end_of(band);
            while (is_empty(band) && end < s.q1 && is_empty(band + 1)) end = end_of(++band);
            const Slice rows = crop(s, begin, end, s.k0, s.k1);
            if (is_empty(band)) {
                visit(rows, owner);
                continue;
            }
            int k = s.k0;
            const Part* last = parts_.data() + offset_[band + 1];
            const Part* part =
                std::partition_point(parts_.data() + offset_[band], last, [&](const Part& p) { return p.end <= s.k0; });
            for (; part != last && part->begin < s.k1; ++part) {
                if (k < part->begin) visit(crop(rows, rows.q0, rows.q1, k, part->begin), owner);
                visit(crop(rows, rows.q0, rows.q1, part->begin, part->end), part->rank);
                k = part->end;
            }
            if (k < s.k1) visit(crop(rows, rows.q0, rows.q1, k, s.k1), owner);
        }
    }

  private:
    struct Part {
        int begin, end, rank;  // keys
    };
    bool is_empty(int band) const {
        return band < 0 || band + 1 >= static_cast<int>(cuts_.size()) || offset_[band] == offset_[band + 1];
    }
    int end_of(int band) const { return band + 1 < static_cast<int>(cuts_.size()) ? cuts_[band + 1] : INT_MAX; }

    std::vector<int> cuts_;    // band i holds the rows [cuts_[i], cuts_[i + 1])
    std::vector<int> offset_;  // [bands + 1] into parts_
    std::vector<Part> parts_;  // of each band, ascending
};

}  // namespace magi::plan
