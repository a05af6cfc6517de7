#include "plan/movement.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "plan/pieces.h"

namespace magi::plan {
namespace {

// Allowed cells of one rank's rows whose keys others own, as one rectangle with a band, no larger than it must be.
struct Remote {
    Slice cells;
    int owner;
};

// How many of some cells lie left of each key: their number at one key is piecewise linear.
class Profile {
  public:
    void add(const Slice& s) {
        const auto count = [&](int64_t k) {
            const int64_t end = s.lo <= kNoLo ? s.q1 : std::min<int64_t>(s.q1, k - s.lo + 1);
            const int64_t begin = s.hi >= kNoHi ? s.q0 : std::max<int64_t>(s.q0, k - s.hi);
            return end - begin;
        };
        // Rows join until `full`, and leave from `thin` on.
        const int64_t full = s.lo <= kNoLo ? s.k0 : std::clamp<int64_t>(int64_t{s.q1} + s.lo - 1, s.k0, s.k1);
        const int64_t thin = s.hi >= kNoHi ? s.k1 : std::clamp<int64_t>(int64_t{s.q0} + s.hi, s.k0, s.k1);
        events_.push_back({s.k0, count(s.k0), 1});
        events_.push_back({full, 0, -1});
        events_.push_back({thin, 0, -1});
        events_.push_back({s.k1, -count(s.k1), 1});
    }

    // Where the running sum first reaches each of `targets`, which ascend.
    std::vector<int> reach(std::span<const double> targets) {
        std::sort(events_.begin(), events_.end(), [](const Event& a, const Event& b) { return a.key < b.key; });
        std::vector<int> out;
        double sum = 0;
        int64_t value = 0, slope = 0;
        for (size_t i = 0; i < events_.size() && out.size() < targets.size(); ++i) {
            value += events_[i].value;
            slope += events_[i].slope;
            if (i + 1 == events_.size()) break;
            const int64_t width = events_[i + 1].key - events_[i].key;
            const auto within = [&](int64_t x) {
                return static_cast<double>(value) * static_cast<double>(x) +
                       static_cast<double>(slope) * static_cast<double>(x) * static_cast<double>(x - 1) / 2;
            };
            while (out.size() < targets.size() && sum + within(width) >= targets[out.size()]) {
                int64_t low = 0, high = width;
                while (low < high) {
                    const int64_t x = (low + high) / 2;
                    sum + within(x) >= targets[out.size()] ? high = x : low = x + 1;
                }
                out.push_back(static_cast<int>(events_[i].key + low));
            }
            sum += within(width);
            value += slope * width;
        }
        out.resize(targets.size(), events_.empty() ? 0 : static_cast<int>(events_.back().key));
        return out;
    }

  private:
    struct Event {
        int64_t key, value, slope;  // added at this key
    };
    std::vector<Event> events_;
};

// What a rank does in a step, forward and backward.
struct Work {
    double area = 0, keys = 0, guests = 0, returned = 0;

    double transfer(const CostModel& cost) const {
        return keys * cost.row * (2 + kGradientRow) + guests * (cost.guest + cost.guest_backward) +
               returned * (cost.returned + cost.returned_backward);
    }
    double time(const CostModel& cost) const {
        return cost.step_time(cost.cell * area * (1 + kBackwardCompute), transfer(cost));
    }
};

// Neighbouring ranks that share all of their rows: each computes them with one range of the keys.
struct Tile {
    int first, count;
    std::vector<int> ranks;  // in the order of the ranges
    std::vector<int> cuts;   // [count + 1] keys between the ranges
};

class Movement {
  public:
    Movement(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
             std::span<const int> k_chunks, const CostModel& cost)
        : cost_(cost),
          whole_tiles_(q_grid.chunk % kTile == 0),
          align_(std::min(k_grid.chunk, kTile)),
          owned_(owned_by_rank(runs_of(k_grid, k_chunks), q_grid.world)),
          offset_(q_grid.world + 1, 0),
          alone_(q_grid.world),
          rest_(q_grid.world) {
        const Runs q_runs = runs_of(q_grid, q_chunks), k_runs = runs_of(k_grid, k_chunks);
        const Needs needs = needs_of(slices, Moves(), q_grid, q_runs, k_runs, 0);
        const double per_key = cost.row * (2 + kGradientRow);
        const double per_guest = cost.guest + cost.returned + cost.guest_backward + cost.returned_backward;
        std::vector<Remote> found;
        for (int r = 0; r < q_grid.world; ++r) {
            for_each_owned(needs.keys.of(r), k_runs, [&](int begin, int end, const Run& run) {
                if (run.rank != r) alone_[r].keys += end - begin;
            });
        }
        std::vector<RangesByRank::Entry> narrow;
        for (const Slice& s : slices) {
            if (s.q0 >= s.q1 || s.k0 >= s.k1 || s.lo > s.hi) continue;
            for (int i = q_runs.first_reaching(s.q0);
                 i < static_cast<int>(q_runs.runs.size()) && q_runs.runs[i].begin < s.q1; ++i) {
                const Run& run = q_runs.runs[i];
                const Slice piece = crop(s, run.begin, run.end, s.k0, s.k1);
                const Range keys = keys_of_rows(piece, piece.q0, piece.q1);
                alone_[run.rank].area += work_of(piece);
                rest_[run.rank].area += work_of(piece);
                int begin = keys.begin;
                const auto take = [&](int end) {
                    const Slice cells = hull(crop(piece, piece.q0, piece.q1, begin, end));
                    if (begin >= end || cells.q0 >= cells.q1) return;
                    // Few rows and many keys: the rows weigh less. The keys of others stay on their way to the rows.
                    if ((cells.k1 - cells.k0) * per_key > (cells.q1 - cells.q0) * per_guest) {
                        found.push_back({cells, run.rank});
                        rest_[run.rank].area -= work_of(cells);
                    } else {
                        narrow.push_back({run.rank, {cells.k0, cells.k1}});
                    }
                };
                const std::span<const Range> own = owned_.of(run.rank);
                auto home =
                    std::partition_point(own.begin(), own.end(), [&](const Range& x) { return x.end <= keys.begin; });
                for (; home != own.end() && home->begin < keys.end; ++home) {
                    take(home->begin);
                    begin = home->end;
                }
                take(keys.end);
            }
        }
        const RangesByRank kept(narrow, q_grid.world);
        for (int r = 0; r < q_grid.world; ++r) {
            for (const Range& range : kept.of(r)) rest_[r].keys += range.end - range.begin;
        }
        for (const Remote& remote : found) ++offset_[remote.owner + 1];
        std::partial_sum(offset_.begin(), offset_.end(), offset_.begin());
        std::vector<int> cursor(offset_);
        remote_.resize(found.size());
        for (const Remote& remote : found) remote_[cursor[remote.owner]++] = remote;
        for (int r = 0; r < q_grid.world; ++r) {
            std::sort(remote_.begin() + offset_[r], remote_.begin() + offset_[r + 1],
                      [](const Remote& a, const Remote& b) { return a.cells.q0 < b.cells.q0; });
        }
    }

    std::vector<Move> run() {
        std::vector<Move> moves;
        for (const Tile& tile : best(0, static_cast<int>(alone_.size())).tiles) emit(tile, moves);
        return moves;
    }

  private:
    static constexpr int kLargestTile = 64;
    static constexpr double kGain = 0.98;  // less than this is not worth the guests' launches

    struct Choice {
        double slowest = 0, traffic = 0;  // seconds; traffic is the sum of the ranks
        std::vector<Tile> tiles;
        double value(double share, int count) const { return slowest + share * traffic / count; }
    };

    double work_of(const Slice& s) const { return whole_tiles_ ? cost_.work({&s, 1}) : static_cast<double>(area(s)); }

    std::span<const Remote> remote(int first, int count) const {
        return {remote_.data() + offset_[first], remote_.data() + offset_[first + count]};
    }

    // The better one of sharing the rows of all these ranks, and of what is best for each half of them.
    Choice best(int first, int count) const {
        if (count == 1) return {alone_[first].time(cost_), alone_[first].transfer(cost_), {}};
        Choice apart = best(first, count / 2);
        Choice second = best(first + count / 2, count - count / 2);
        apart.slowest = std::max(apart.slowest, second.slowest);
        apart.traffic += second.traffic;
        std::move(second.tiles.begin(), second.tiles.end(), std::back_inserter(apart.tiles));
        if (count > kLargestTile || remote(first, count).empty()) return apart;
        Choice together = share(first, count);
        return together.value(cost_.traffic, count) < kGain * apart.value(cost_.traffic, count) ? together : apart;
    }

    // The remote cells of these ranks, cut between keys into one range for each, by what its own keys leave it time
    // for.
    Choice share(int first, int count) const {
        const std::span<const Remote> pool = remote(first, count);
        Tile tile{first, count, std::vector<int>(count), std::vector<int>(count + 1, 0)};
        std::iota(tile.ranks.begin(), tile.ranks.end(), first);
        const auto middle = [&](int rank) {
            const std::span<const Range> own = owned_.of(rank);
            return own.empty() ? 0 : own[own.size() / 2].begin;
        };
        std::stable_sort(tile.ranks.begin(), tile.ranks.end(), [&](int a, int b) { return middle(a) < middle(b); });

        Profile profile;
        double total = 0, pooled = 0;
        for (const Remote& x : pool) {
            profile.add(x.cells);
            pooled += static_cast<double>(area(x.cells));
        }
        for (int r = first; r < first + count; ++r) total += alone_[r].area;
        std::vector<double> quota(count), targets(count - 1);
        for (int i = 0; i < count; ++i) quota[i] = std::max(0.0, total / count - rest_[tile.ranks[i]].area);
        const double room = std::accumulate(quota.begin(), quota.end(), 0.0);
        for (double& q : quota) q *= room > 0 ? pooled / room : 0;
        std::partial_sum(quota.begin(), quota.end() - 1, targets.begin());
        const std::vector<int> reached = profile.reach(targets);
        for (int i = 1; i < count; ++i) tile.cuts[i] = (reached[i - 1] + align_ / 2) / align_ * align_;
        tile.cuts[count] = std::numeric_limits<int>::max();

        std::vector<Work> work(count);  // by range
        std::vector<int> place(count);  // of each rank among the ranges
        for (int i = 0; i < count; ++i) {
            work[i] = rest_[tile.ranks[i]];
            place[tile.ranks[i] - first] = i;
        }
        std::vector<Range> keys;
        std::vector<int> seen(count);  // rows before have been counted in each range
        int owner = -1;
        for (const Remote& x : pool) {
            keys.push_back({x.cells.k0, x.cells.k1});
            if (x.owner != owner) std::fill(seen.begin(), seen.end(), 0);
            owner = x.owner;
            int i =
                static_cast<int>(std::upper_bound(tile.cuts.begin(), tile.cuts.end(), x.cells.k0) - tile.cuts.begin()) -
                1;
            for (; i < count && tile.cuts[i] < x.cells.k1; ++i) {
                const Slice part = hull(crop(x.cells, x.cells.q0, x.cells.q1, tile.cuts[i], tile.cuts[i + 1]));
                if (part.q0 >= part.q1) continue;
                work[i].area += work_of(part);
                if (tile.ranks[i] == owner) continue;
                const int rows = std::max(0, part.q1 - std::max(part.q0, seen[i]));
                seen[i] = std::max(seen[i], part.q1);
                work[i].guests += rows;
                work[place[owner - first]].returned += rows;
            }
        }
        keys.resize(merge_ranges(keys));
        Choice out;
        for (int i = 0; i < count; ++i) {
            const auto overlap = [&](std::span<const Range> ranges, int begin, int end) {
                auto it =
                    std::partition_point(ranges.begin(), ranges.end(), [&](const Range& r) { return r.end <= begin; });
                double rows = 0;
                for (; it != ranges.end() && it->begin < end; ++it)
                    rows += std::min(it->end, end) - std::max(it->begin, begin);
                return rows;
            };
            work[i].keys += overlap(keys, tile.cuts[i], tile.cuts[i + 1]);
            for (const Range& own : owned_.of(tile.ranks[i])) {
                const int begin = std::max(own.begin, tile.cuts[i]), end = std::min(own.end, tile.cuts[i + 1]);
                if (begin < end) work[i].keys -= overlap(keys, begin, end);
            }
            out.slowest = std::max(out.slowest, work[i].time(cost_));
            out.traffic += work[i].transfer(cost_);
        }
        out.tiles.push_back(std::move(tile));
        return out;
    }

    // Disjoint rectangles of a tile: in each band of one owner's rows, the union of the keys that it needs from others.
    void emit(const Tile& tile, std::vector<Move>& moves) const {
        for (int owner = tile.first; owner < tile.first + tile.count; ++owner) {
            const std::span<const Remote> cells = remote(owner, 1);
            std::vector<int> rows;
            for (const Remote& x : cells) rows.insert(rows.end(), {x.cells.q0, x.cells.q1});
            std::sort(rows.begin(), rows.end());
            rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
            std::vector<std::vector<Range>> bands(rows.size());
            for (const Remote& x : cells) {
                auto band = std::lower_bound(rows.begin(), rows.end(), x.cells.q0) - rows.begin();
                for (; rows[band] < x.cells.q1; ++band) bands[band].push_back({x.cells.k0, x.cells.k1});
            }
            for (size_t band = 0; band + 1 < rows.size(); ++band) {
                bands[band].resize(merge_ranges(bands[band]));
                for (const Range& keys : bands[band]) {
                    for (int i = 0; i < tile.count; ++i) {
                        const int begin = std::max(keys.begin, tile.cuts[i]);
                        const int end = std::min(keys.end, tile.cuts[i + 1]);
                        if (begin < end && tile.ranks[i] != owner)
                            moves.push_back({rows[band], rows[band + 1], begin, end, tile.ranks[i]});
                    }
                }
            }
        }
    }

    const CostModel& cost_;
    bool whole_tiles_;            // of rows in every chunk: then work counts tiles, or else cells
    int align_;                   // keys between ranges are multiples of this
    RangesByRank owned_;          // keys
    std::vector<int> offset_;     // [world + 1] into remote_
    std::vector<Remote> remote_;  // what may be shared, by owner, in the order of its rows
    std::vector<Work> alone_;     // of every rank, where only keys move
    std::vector<Work> rest_;      // of every rank, without what may be shared
};

}  // namespace

std::vector<Move> choose_moves(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                               std::span<const int> k_chunks, const CostModel& cost) {
    return Movement(slices, q_grid, q_chunks, k_grid, k_chunks, cost).run();
}

}  // namespace magi::plan
