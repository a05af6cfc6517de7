// Overlapping cells are found, cells that only look close are not.
#include <gtest/gtest.h>

#include <chrono>

#include "masks.h"
#include "plan/disjoint.h"

namespace magi::plan {
namespace {

using Pair = std::pair<int64_t, int64_t>;

TEST(FindOverlap, AgreesWithCounting) {
    std::mt19937 random(7);
    int found = 0;
    for (int round = 0; round < 3000; ++round) {
        std::vector<Slice> mask;
        for (int i = 0; i < 2 + round % 6; ++i) {
            const int q = random() % 20, k = random() % 20, band = static_cast<int>(random() % 30) - 15;
            mask.push_back({q, q + static_cast<int>(random() % 8), k, k + static_cast<int>(random() % 8),
                            random() % 2 ? kNoLo : band, random() % 2 ? kNoHi : band + static_cast<int>(random() % 9)});
        }
        const auto covered_twice = [](const Slice& a, const Slice& b) {
            for (int q = 0; q < 28; ++q) {
                for (int k = 0; k < 28; ++k) {
                    const auto holds = [&](const Slice& s) {
                        return q >= s.q0 && q < s.q1 && k >= s.k0 && k < s.k1 && in_band(s, q, k);
                    };
                    if (holds(a) && holds(b)) return true;
                }
            }
            return false;
        };
        bool any = false;
        for (size_t i = 0; i < mask.size(); ++i) {
            for (size_t j = 0; j < i; ++j) any = any || covered_twice(mask[i], mask[j]);
        }
        const Pair pair = find_overlap(mask);
        ASSERT_EQ(pair.first >= 0, any);
        if (any) {
            ASSERT_LT(pair.first, pair.second);
            ASSERT_TRUE(covered_twice(mask[pair.first], mask[pair.second]));
            ++found;
        }
    }
    EXPECT_GT(found, 300);
}

TEST(FindOverlap, ComplementaryBandsShareARectangle) {
    EXPECT_EQ(find_overlap(std::vector<Slice>{{0, 9, 0, 9, kNoLo, 2}, {0, 9, 0, 9, 3, kNoHi}}), Pair(-1, -1));
    EXPECT_EQ(find_overlap(std::vector<Slice>{{0, 9, 0, 9, kNoLo, 3}, {0, 9, 0, 9, 3, kNoHi}}), Pair(0, 1));
}

TEST(FindOverlap, HundredThousandSlicesAreNotQuadratic) {
    std::vector<Slice> mask;
    for (int i = 0; i < 50000; ++i) {  // each row block sees itself and a shared prefix of its group
        const int q = 1000 + i * 64;
        mask.push_back(causal(q, q + 64, q, q + 64));
        mask.push_back({q, q + 64, 0, 1000, kNoLo, kNoHi});
    }
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_EQ(find_overlap(mask), Pair(-1, -1));
    EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), 2.0);
    mask.push_back({1000, 1064 + 64 * 40000, 999, 1000, kNoLo, kNoHi});
    EXPECT_GE(find_overlap(mask).first, 0);
}

}  // namespace
}  // namespace magi::plan
