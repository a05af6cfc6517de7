#include "plan/relay.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <tuple>

#include "plan/pieces.h"

namespace magi::plan {
namespace {

// Rows of one owner that travel in one stage.
struct Cargo {
    int begin, end, owner, stage;
};

int64_t total_rows(std::span<const Cargo> rows) {
    return std::accumulate(rows.begin(), rows.end(), int64_t{0},
                           [](int64_t sum, const Cargo& piece) { return sum + piece.end - piece.begin; });
}

// Divides rows in global order among the stages, from `first` on.
std::vector<Cargo> staged(std::span<const Cargo> rows, std::span<const int64_t> ends, int first) {
    std::vector<Cargo> out;
    size_t stage = 0;
    int64_t seen = 0;
    for (Cargo piece : rows) {
        while (piece.begin < piece.end) {
            while (seen >= ends[stage]) ++stage;
            const int count = static_cast<int>(std::min<int64_t>(ends[stage] - seen, piece.end - piece.begin));
            out.push_back({piece.begin, piece.begin + count, piece.owner, first + static_cast<int>(stage)});
            piece.begin += count;
            seen += count;
        }
    }
    return out;
}

void append(std::vector<Range>& ranges, int begin, int count) {
    if (!ranges.empty() && ranges.back().end == begin) {
        ranges.back().end += count;
    } else {
        ranges.push_back({begin, begin + count});
    }
}

// What both passes share.
struct Network {
    const Runs& k_runs;
    const Needs& needs;
    const CostModel& cost;
    int rank, world, node_size, local_rows;
    std::vector<std::vector<Cargo>> far;   // of each node: rows that any of its ranks needs from outside
    std::vector<std::vector<Cargo>> near;  // of each rank: rows that it needs from the others of its node

    int nodes() const { return world / node_size; }
    int node_of(int of_rank) const { return of_rank / node_size; }
    int place_of(int of_rank) const { return of_rank % node_size; }
    int local_row(int row) const {
        const Run& run = k_runs.runs[k_runs.first_reaching(row)];
        return run.local + row - run.begin;
    }
};

// Far rows of every node in stages, the same for all of its ranks. They arrive while the node computes with its own
// rows; the cost model sees the node as one rank.
std::vector<Cargo> far_in_stages(Pass pass, const Network& net, int node, int num_stages) {
    int64_t own_area = 0, area = 0, near_rows = 0;
    for (int r = node * net.node_size; r < (node + 1) * net.node_size; ++r) {
        own_area += net.needs.own[r];
        area += net.needs.area[r];
        near_rows += total_rows(net.near[r]);
    }
    const int64_t far_rows = total_rows(net.far[node]);
    const double far_share =
        far_rows > 0 ? static_cast<double>(far_rows) / static_cast<double>(near_rows + far_rows) : 0;
    const auto far_area = static_cast<int64_t>(far_share * static_cast<double>(area - own_area));
    const int first = first_crossing(num_stages);
    std::vector<int64_t> ends(num_stages - first);
    divide(pass, far_rows, area - far_area, far_area, net.cost, ends);
    return staged(net.far[node], ends, first);
}

// Near rows of a receiver in stages: in equal parts in the first few, as many as make its pass the shortest.
std::vector<Cargo> near_in_stages(Pass pass, const Network& net, int receiver, std::span<const int64_t> far_rows) {
    const int stages = static_cast<int>(far_rows.size());
    const int64_t near = total_rows(net.near[receiver]);
    const int64_t remote = std::accumulate(far_rows.begin(), far_rows.end(), near);
    const double own = static_cast<double>(net.needs.own[receiver]);
    const double density =
        remote > 0 ? (static_cast<double>(net.needs.area[receiver]) - own) / static_cast<double>(remote) : 0;
    std::vector<int64_t> ends(stages), trial(stages);
    std::vector<double> areas(1 + stages), rows(stages);
    areas[0] = own;
    double best = std::numeric_limits<double>::infinity();
    for (int used = 1; used <= stages; ++used) {
        for (int s = 0; s < stages; ++s) {
            trial[s] = near * std::min(s + 1, used) / used;
            rows[s] = static_cast<double>(far_rows[s] + trial[s] - (s > 0 ? trial[s - 1] : 0));
            areas[1 + s] = density * rows[s];
        }
        const double time = net.cost.staged_time(pass, areas, rows);
        if (time < best) {
            best = time;
            ends = trial;
        }
    }
    return staged(net.near[receiver], ends, 0);
}

// Where the rows that a rank relays lie: after its own rows, by source node.
class Relayed {
  public:
    Relayed(const Network& net, std::span<const Cargo> entering, std::span<const RelayStage> stages) : net_(net) {
        std::vector<std::vector<int>> next(stages.size(), std::vector<int>(net.nodes()));
        for (size_t s = 0; s < stages.size(); ++s) {
            std::exclusive_scan(stages[s].relay_splits.begin() + net.nodes(), stages[s].relay_splits.end(),
                                next[s].begin(), net.local_rows);
        }
        for (const Cargo& piece : entering) {
            if (net.place_of(piece.owner) != net.place_of(net.rank)) continue;
            int& offset = next[piece.stage][net.node_of(piece.owner)];
            places_.push_back({piece.begin, piece.end, offset});
            offset += piece.end - piece.begin;
        }
    }

    // First of the piece's rows in [local rows | relayed rows].
    int held_at(const Cargo& piece) const {
        if (piece.owner == net_.rank) return net_.local_row(piece.begin);
        const auto at = std::partition_point(places_.begin(), places_.end(),
                                             [&](const Place& place) { return place.end <= piece.begin; });
        return at->offset + piece.begin - at->begin;
    }

  private:
    struct Place {
        int begin, end, offset;
    };
    const Network& net_;
    std::vector<Place> places_;  // in global order
};

RelaySchedule make_pass(Pass pass, int num_stages, const Network& net) {
    const int node = net.node_of(net.rank), here = net.place_of(net.rank);
    RelaySchedule out{std::vector<RelayStage>(num_stages),
                      std::vector<int64_t>(static_cast<size_t>(net.world) * num_stages, 0)};
    for (RelayStage& stage : out.stages) {
        stage.relay_splits.assign(2 * static_cast<size_t>(net.nodes()), 0);
        stage.splits.assign(2 * static_cast<size_t>(net.node_size), 0);
    }

    // Between nodes: each node is one receiver of what its ranks need from outside.
    std::vector<std::vector<Cargo>> entering(net.nodes());  // in global order
    for (int to = 0; to < net.nodes(); ++to) {
        entering[to] = far_in_stages(pass, net, to, num_stages);
        for (const Cargo& piece : entering[to]) {
            RelayStage& stage = out.stages[piece.stage];
            const int count = piece.end - piece.begin;
            if (piece.owner == net.rank) {
                stage.relay_splits[to] += count;
                append(stage.relay_send, net.local_row(piece.begin), count);
            }
            if (to == node && net.place_of(piece.owner) == here) {
                stage.relay_splits[net.nodes() + net.node_of(piece.owner)] += count;
            }
        }
    }
    const Relayed relayed(net, entering[node], out.stages);

    // Inside the nodes.
    std::vector<Segment> segments;  // of this rank
    const auto buffer_order = [&](const Cargo& a, const Cargo& b) {
        return std::tuple(a.stage, net.place_of(a.owner), net.node_of(a.owner), a.begin) <
               std::tuple(b.stage, net.place_of(b.owner), net.node_of(b.owner), b.begin);
    };
    for (int receiver = 0; receiver < net.world; ++receiver) {
        const std::vector<Cargo>& from_outside = entering[net.node_of(receiver)];
        std::vector<Cargo> cargo;
        std::vector<int64_t> far_rows(num_stages, 0);
        for (const Range& need : net.needs.keys.of(receiver)) {
            auto piece = std::partition_point(from_outside.begin(), from_outside.end(),
                                              [&](const Cargo& c) { return c.end <= need.begin; });
            for (; piece != from_outside.end() && piece->begin < need.end; ++piece) {
                cargo.push_back(
                    {std::max(piece->begin, need.begin), std::min(piece->end, need.end), piece->owner, piece->stage});
                far_rows[piece->stage] += cargo.back().end - cargo.back().begin;
            }
        }
        const std::vector<Cargo> near = near_in_stages(pass, net, receiver, far_rows);
        cargo.insert(cargo.end(), near.begin(), near.end());
        for (const Cargo& piece : cargo) {
            out.rows[static_cast<size_t>(receiver) * num_stages + piece.stage] += piece.end - piece.begin;
        }
        if (net.node_of(receiver) != node) continue;

        std::sort(cargo.begin(), cargo.end(), buffer_order);
        int last_stage = -1, offset = 0;
        for (const Cargo& piece : cargo) {
            RelayStage& stage = out.stages[piece.stage];
            const int count = piece.end - piece.begin;
            if (net.place_of(piece.owner) == here) {
                stage.splits[net.place_of(receiver)] += count;
                append(stage.send, relayed.held_at(piece), count);
            }
            if (receiver != net.rank) continue;
            stage.splits[net.node_size + net.place_of(piece.owner)] += count;
            offset = piece.stage == last_stage ? offset : 0;
            last_stage = piece.stage;
            segments.push_back({piece.begin, piece.end, piece.owner, piece.stage, offset});
            offset += count;
        }
    }
    std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.begin < b.begin; });
    std::vector<std::vector<Slice>> placed = place(net.needs.pieces, segments, num_stages);
    for (int s = 0; s < num_stages; ++s) out.stages[s].slices = std::move(placed[s]);
    return out;
}

}  // namespace

RelayTables make_relay_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                              std::span<const int> k_chunks, int rank, int node_size, StageCounts counts,
                              const CostModel& cost) {
    const int world = q_grid.world;
    const Runs q_runs = runs_of(q_grid, q_chunks), k_runs = runs_of(k_grid, k_chunks);
    const Needs needs = needs_of(slices, Moves(), q_grid, q_runs, k_runs, rank);

    RelayTables out;
    const auto ranges_of = [](std::span<const Range> ranges) {
        return std::vector<Range>(ranges.begin(), ranges.end());
    };
    out.q_ranges = ranges_of(owned_by_rank(q_runs, world).of(rank));
    out.k_ranges = ranges_of(owned_by_rank(k_runs, world).of(rank));

    Network net{k_runs, needs, cost, rank, world, node_size, k_grid.slots * k_grid.chunk, {}, {}};
    net.near.resize(world);
    std::vector<Segment> own;
    for (int receiver = 0; receiver < world; ++receiver) {
        int64_t remote = 0;
        for_each_owned(needs.keys.of(receiver), k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank != receiver) remote += end - begin;
            if (run.rank != receiver && net.node_of(run.rank) == net.node_of(receiver)) {
                net.near[receiver].push_back({begin, end, run.rank, 0});
            }
            if (run.rank == receiver && receiver == rank) {
                own.push_back({begin, end, rank, 0, run.local + begin - run.begin});
            }
        });
        out.ranks.push_back({needs.area[receiver], remote, 0, 0});
    }
    net.far.resize(net.nodes());
    for (int node = 0; node < net.nodes(); ++node) {
        std::vector<Range> wanted;
        for (int r = node * node_size; r < (node + 1) * node_size; ++r) {
            wanted.insert(wanted.end(), needs.keys.of(r).begin(), needs.keys.of(r).end());
        }
        wanted.resize(merge_ranges(wanted));
        for_each_owned(wanted, k_runs, [&](int begin, int end, const Run& run) {
            if (net.node_of(run.rank) != node) net.far[node].push_back({begin, end, run.rank, 0});
        });
    }
    out.slices = std::move(place(needs.pieces, own, 1)[0]);
    out.forward = make_pass(Pass::kForward, counts.forward, net);
    out.backward = make_pass(Pass::kBackward, counts.backward, net);
    return out;
}

}  // namespace magi::plan
