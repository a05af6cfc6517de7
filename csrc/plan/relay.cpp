#include "plan/relay.h"

#include <algorithm>
#include <tuple>

#include "plan/pieces.h"

namespace magi::plan {
namespace {

// Rows of one owner that travel in one stage.
struct Cargo {
    int begin, end, owner, stage;
};

// Divides rows in global order among the stages.
std::vector<Cargo> staged(const std::vector<Cargo>& rows, std::span<const int64_t> ends) {
    std::vector<Cargo> out;
    int stage = 0;
    int64_t seen = 0;
    for (Cargo piece : rows) {
        while (piece.begin < piece.end) {
            while (seen >= ends[stage]) ++stage;
            const int count = static_cast<int>(std::min<int64_t>(ends[stage] - seen, piece.end - piece.begin));
            out.push_back({piece.begin, piece.begin + count, piece.owner, stage});
            piece.begin += count;
            seen += count;
        }
    }
    return out;
}

int64_t total_rows(const std::vector<Cargo>& rows) {
    int64_t sum = 0;
    for (const Cargo& piece : rows) sum += piece.end - piece.begin;
    return sum;
}

void append(std::vector<Range>& ranges, Range next) {
    if (!ranges.empty() && ranges.back().end == next.begin) {
        ranges.back().end = next.end;
    } else {
        ranges.push_back(next);
    }
}

}  // namespace

RelayTables make_relay_tables(Slices slices, const Grid& q_grid, std::span<const int> q_chunks, const Grid& k_grid,
                              std::span<const int> k_chunks, int rank, int node_size, int num_stages,
                              const CostModel& cost) {
    const int world = q_grid.world, node = rank / node_size, place_in_node = rank % node_size;
    const Runs q_runs = runs_of(q_grid, q_chunks), k_runs = runs_of(k_grid, k_chunks);
    const Needs needs = needs_of(slices, q_grid, q_runs, k_runs, rank);
    const auto local_row = [&](int row) {
        const Run& run = k_runs.runs[k_runs.first_reaching(row)];
        return run.local + row - run.begin;
    };

    RelayTables out;
    out.stages.resize(num_stages);
    for (RelayStage& stage : out.stages) {
        stage.relay_splits.assign(2 * static_cast<size_t>(world), 0);
        stage.splits.assign(2 * static_cast<size_t>(world), 0);
    }
    std::vector<int64_t> ends(num_stages);

    // Between nodes: each node is one receiver of what its ranks need from outside.
    std::vector<Cargo> entering;  // this node, in global order
    for (int to = 0; to < world / node_size; ++to) {
        std::vector<Range> wanted;
        int64_t own_area = 0, area = 0;
        for (int r = to * node_size; r < (to + 1) * node_size; ++r) {
            wanted.insert(wanted.end(), needs.of(r).begin(), needs.of(r).end());
            own_area += needs.own[r];
            area += needs.area[r];
        }
        wanted.resize(merge_ranges(wanted));
        std::vector<Cargo> rows;
        for_each_owned(wanted, k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank / node_size != to) rows.push_back({begin, end, run.rank, 0});
        });
        divide(Pass::kForward, total_rows(rows), own_area, area - own_area, cost, ends);
        rows = staged(rows, ends);
        for (const Cargo& piece : rows) {
            if (piece.owner != rank) continue;
            RelayStage& stage = out.stages[piece.stage];
            const int first = local_row(piece.begin), count = piece.end - piece.begin;
            stage.relay_splits[to * node_size + place_in_node] += count;
            append(stage.relay_send, {first, first + count});
        }
        if (to == node) entering = std::move(rows);
    }

    // Where the rows that this rank relays lie: after its own rows, by source node.
    struct Relayed {
        int begin, end, offset;
    };
    std::vector<Relayed> relayed;  // in global order
    std::vector<std::vector<int>> next_relayed(num_stages, std::vector<int>(world / node_size, 0));
    for (const Cargo& piece : entering) {
        if (piece.owner % node_size == place_in_node)
            out.stages[piece.stage].relay_splits[world + piece.owner] += piece.end - piece.begin;
    }
    for (int s = 0; s < num_stages; ++s) {
        int offset = k_grid.slots * k_grid.chunk;
        for (int from = 0; from < world / node_size; ++from) {
            next_relayed[s][from] = offset;
            offset += static_cast<int>(out.stages[s].relay_splits[world + from * node_size + place_in_node]);
        }
    }
    for (const Cargo& piece : entering) {
        if (piece.owner % node_size != place_in_node) continue;
        int& next = next_relayed[piece.stage][piece.owner / node_size];
        relayed.push_back({piece.begin, piece.end, next});
        next += piece.end - piece.begin;
    }
    const auto held_at = [&](const Cargo& piece) {
        if (piece.owner == rank) return local_row(piece.begin);
        const auto at = std::partition_point(relayed.begin(), relayed.end(),
                                             [&](const Relayed& r) { return r.end <= piece.begin; });
        return at->offset + piece.begin - at->begin;
    };

    // Inside the node.
    std::vector<Segment> segments;  // of this rank, in global order
    std::vector<Cargo> arriving;    // of this rank, in the order of its buffers
    const auto buffer_order = [&](const Cargo& a, const Cargo& b) {
        return std::tuple(a.stage, a.owner % node_size, a.owner / node_size, a.begin) <
               std::tuple(b.stage, b.owner % node_size, b.owner / node_size, b.begin);
    };
    for (int receiver = node * node_size; receiver < (node + 1) * node_size; ++receiver) {
        std::vector<Cargo> near, cargo;
        for_each_owned(needs.of(receiver), k_runs, [&](int begin, int end, const Run& run) {
            if (run.rank == receiver && receiver == rank)
                segments.push_back({begin, end, rank, 0, run.local + begin - run.begin});
            if (run.rank != receiver && run.rank / node_size == node) near.push_back({begin, end, run.rank, 0});
        });
        divide(Pass::kForward, total_rows(near), needs.own[receiver], needs.area[receiver] - needs.own[receiver], cost,
               ends);
        cargo = staged(near, ends);
        for (const Range& need : needs.of(receiver)) {
            auto piece = std::partition_point(entering.begin(), entering.end(),
                                              [&](const Cargo& c) { return c.end <= need.begin; });
            for (; piece != entering.end() && piece->begin < need.end; ++piece) {
                cargo.push_back(
                    {std::max(piece->begin, need.begin), std::min(piece->end, need.end), piece->owner, piece->stage});
            }
        }
        std::sort(cargo.begin(), cargo.end(), buffer_order);
        for (const Cargo& piece : cargo) {
            RelayStage& stage = out.stages[piece.stage];
            const int count = piece.end - piece.begin;
            if (piece.owner % node_size == place_in_node) {
                const int first = held_at(piece);
                stage.splits[receiver] += count;
                append(stage.send, {first, first + count});
            }
            if (receiver == rank) stage.splits[world + node * node_size + piece.owner % node_size] += count;
        }
        if (receiver == rank) arriving = std::move(cargo);
    }
    int stage = -1, offset = 0;
    for (const Cargo& piece : arriving) {
        if (piece.stage != stage) offset = 0;
        stage = piece.stage;
        segments.push_back({piece.begin, piece.end, piece.owner, 1 + stage, offset});
        offset += piece.end - piece.begin;
    }
    std::sort(segments.begin(), segments.end(), [](const Segment& a, const Segment& b) { return a.begin < b.begin; });

    std::vector<std::vector<Slice>> placed = place(needs.pieces, segments, 1 + num_stages);
    out.slices = std::move(placed[0]);
    for (int s = 0; s < num_stages; ++s) out.stages[s].slices = std::move(placed[1 + s]);
    return out;
}

}  // namespace magi::plan
