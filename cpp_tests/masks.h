// Masks for tests, from one seed each.
#pragma once

#include <random>
#include <set>
#include <vector>

#include "band.h"

namespace magi::plan {

inline Slice causal(int q0, int q1, int k0, int k1) { return slice_of(q0, q1, k0, k1, kCausal); }

inline std::vector<Slice> documents(const std::vector<int>& lengths) {
    std::vector<Slice> out;
    int begin = 0;
    for (const int length : lengths) {
        out.push_back(causal(begin, begin + length, begin, begin + length));
        begin += length;
    }
    return out;
}

// Random bands in the cells of a random grid: they cannot overlap.
inline std::vector<Slice> random_bands(int total_q, int total_k, unsigned seed) {
    std::mt19937 random(seed);
    const auto cuts = [&](int total, int count) {
        std::set<int> at{0, total};
        for (int i = 0; i < count; ++i) at.insert(static_cast<int>(random() % (total + 1)));
        return std::vector<int>(at.begin(), at.end());
    };
    const std::vector<int> q = cuts(total_q, 5), k = cuts(total_k, 4);
    std::vector<Slice> out;
    for (size_t i = 0; i + 1 < q.size(); ++i) {
        for (size_t j = 0; j + 1 < k.size(); ++j) {
            if (random() % 2) continue;
            const int lo = random() % 2 ? kNoLo : static_cast<int>(random() % 120) - 60;
            const int hi = random() % 2 ? kNoHi : static_cast<int>(random() % 120) - 60;
            out.push_back({q[i], q[i + 1], k[j], k[j + 1], lo, hi});
        }
    }
    std::shuffle(out.begin(), out.end(), random);
    return out;
}

}  // namespace magi::plan
