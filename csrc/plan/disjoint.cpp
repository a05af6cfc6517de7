#include "plan/disjoint.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace magi::plan {
namespace {

bool share_a_cell(const Slice& a, const Slice& b) {
    Slice both = crop(a, b.q0, b.q1, b.k0, b.k1);
    both.lo = std::max(a.lo, b.lo);
    both.hi = std::min(a.hi, b.hi);
    return area(both) > 0;
}

// Key intervals of the slices that reach the current row. Intervals over a point come from a segment tree, intervals
// that start inside a range from an ordered set; ended ones are dropped when they are met.
class Active {
  public:
    explicit Active(Slices hulls) : hulls_(hulls) {
        for (const Slice& s : hulls) points_.insert(points_.end(), {s.k0, s.k1});
        std::sort(points_.begin(), points_.end());
        points_.erase(std::unique(points_.begin(), points_.end()), points_.end());
        while (leaves_ < points_.size()) leaves_ *= 2;
        nodes_.resize(2 * leaves_);
    }

    void insert(int64_t index) {
        const Slice& s = hulls_[index];
        starts_.insert({s.k0, index});
        for (size_t a = leaf(s.k0) + leaves_, b = leaf(s.k1) + leaves_; a < b; a /= 2, b /= 2) {
            if (a & 1) nodes_[a++].push_back(index);
            if (b & 1) nodes_[--b].push_back(index);
        }
    }

    // Calls visit(other) for every live interval that meets that of `index`, until it returns true.
    template <typename Visit>
    bool any_meeting(int64_t index, Visit visit) {
        const Slice& s = hulls_[index];
        for (size_t node = leaf(s.k0) + leaves_; node > 0; node /= 2) {
            std::vector<int64_t>& held = nodes_[node];
            for (size_t i = 0; i < held.size();) {
                if (hulls_[held[i]].q1 <= s.q0) {
                    held[i] = held.back();
                    held.pop_back();
                } else if (visit(held[i])) {
                    return true;
                } else {
                    ++i;
                }
            }
        }
        for (auto it = starts_.upper_bound({s.k0, static_cast<int64_t>(hulls_.size())});
             it != starts_.end() && it->first < s.k1;) {
            if (hulls_[it->second].q1 <= s.q0) {
                it = starts_.erase(it);
            } else if (visit(it->second)) {
                return true;
            } else {
                ++it;
            }
        }
        return false;
    }

  private:
    size_t leaf(int point) const { return std::lower_bound(points_.begin(), points_.end(), point) - points_.begin(); }

    Slices hulls_;
    std::vector<int> points_;
    size_t leaves_ = 1;
    std::vector<std::vector<int64_t>> nodes_;
    std::set<std::pair<int, int64_t>> starts_;
};

}  // namespace

std::pair<int64_t, int64_t> find_overlap(Slices slices) {
    std::vector<Slice> hulls(slices.size());
    std::transform(slices.begin(), slices.end(), hulls.begin(), [](const Slice& s) { return hull(s); });
    std::vector<int64_t> order;
    for (size_t i = 0; i < hulls.size(); ++i) {
        if (hulls[i].q0 < hulls[i].q1) order.push_back(static_cast<int64_t>(i));
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return hulls[a].q0 < hulls[b].q0; });

    // Slices whose rows follow one another, as packed documents do, need no search.
    const bool stacked = std::adjacent_find(order.begin(), order.end(), [&](int64_t a, int64_t b) {
                             return hulls[a].q1 > hulls[b].q0;
                         }) == order.end();
    if (stacked) return {-1, -1};

    Active active(hulls);
    for (const int64_t index : order) {
        int64_t other = -1;
        if (active.any_meeting(index, [&](int64_t candidate) {
                other = candidate;
                return share_a_cell(hulls[index], hulls[candidate]);
            })) {
            return std::minmax(index, other);
        }
        active.insert(index);
    }
    return {-1, -1};
}

}  // namespace magi::plan
