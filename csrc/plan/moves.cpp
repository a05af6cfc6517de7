#include "plan/moves.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace magi::plan {

Moves::Moves(std::span<const Move> moves, int total_q, int total_k, int world) {
    for (size_t i = 0; i < moves.size(); ++i) {
        const Move& m = moves[i];
        const bool inside = 0 <= m.q0 && m.q0 <= m.q1 && m.q1 <= total_q && 0 <= m.k0 && m.k0 <= m.k1 &&
                            m.k1 <= total_k && 0 <= m.rank && m.rank < world;
        if (!inside) {
            throw std::invalid_argument("moves[" + std::to_string(i) + "] must lie within [0, " +
                                        std::to_string(total_q) + ") x [0, " + std::to_string(total_k) +
                                        ") and name a rank below " + std::to_string(world));
        }
        if (m.q0 == m.q1 || m.k0 == m.k1) continue;
        cuts_.insert(cuts_.end(), {m.q0, m.q1});
    }
    std::sort(cuts_.begin(), cuts_.end());
    cuts_.erase(std::unique(cuts_.begin(), cuts_.end()), cuts_.end());
    if (cuts_.empty()) return;

    const auto band_at = [&](int row) { return std::lower_bound(cuts_.begin(), cuts_.end(), row) - cuts_.begin(); };
    offset_.assign(cuts_.size(), 0);
    for (const Move& m : moves) {
        if (m.q0 == m.q1 || m.k0 == m.k1) continue;
        for (auto b = band_at(m.q0); b < band_at(m.q1); ++b) ++offset_[b + 1];
    }
    std::partial_sum(offset_.begin(), offset_.end(), offset_.begin());
    std::vector<int> cursor(offset_);
    parts_.resize(offset_.back());
    for (const Move& m : moves) {
        if (m.q0 == m.q1 || m.k0 == m.k1) continue;
        for (auto b = band_at(m.q0); b < band_at(m.q1); ++b) parts_[cursor[b]++] = {m.k0, m.k1, m.rank};
    }
    for (size_t b = 0; b + 1 < cuts_.size(); ++b) {
        const std::span<Part> band(parts_.data() + offset_[b], parts_.data() + offset_[b + 1]);
        std::sort(band.begin(), band.end(), [](const Part& x, const Part& y) { return x.begin < y.begin; });
        for (size_t i = 1; i < band.size(); ++i) {
            if (band[i].begin < band[i - 1].end) {
                throw std::invalid_argument("moves: two of them share the cell [" + std::to_string(cuts_[b]) + ", " +
                                            std::to_string(band[i].begin) + "]");
            }
        }
    }
}

}  // namespace magi::plan
