// The border of the planner: tensors in, tensors out; no planning here. Host code: these ops run on CPU tensors and are
// not traced.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

#include "ops/checks.h"
#include "plan/disjoint.h"
#include "plan/movement.h"
#include "plan/ownership.h"
#include "plan/relay.h"
#include "plan/tables.h"

namespace magi {
namespace {

using torch::stable::new_empty;

static_assert(sizeof(Slice) == 6 * sizeof(int) && sizeof(Range) == 2 * sizeof(int) &&
                  sizeof(plan::Move) == 5 * sizeof(int),
              "slices, ranges and moves are int32 table rows");

Tensor check_host_slices(const Tensor& slices, int64_t total_q, int64_t total_k) {
    const Tensor table = check_table(slices, 6, "slices");
    const Slice* rows = static_cast<const Slice*>(table.data_ptr());
    for (int64_t i = 0; i < table.size(0); ++i) {
        const Slice& s = rows[i];
        MAGI_CHECK(0 <= s.q0 && s.q0 <= s.q1 && s.q1 <= total_q && 0 <= s.k0 && s.k0 <= s.k1 && s.k1 <= total_k,
                   "slices[", i, "] must have ranges within [0, ", total_q, ") x [0, ", total_k, "), got [", s.q0, ", ",
                   s.q1, ") x [", s.k0, ", ", s.k1, ")");
    }
    return table;
}

plan::Slices span_of(const Tensor& slices) {
    return {static_cast<const Slice*>(slices.data_ptr()), static_cast<size_t>(slices.size(0))};
}

plan::Grid check_grid(const std::vector<int64_t>& grid, const char* name) {
    MAGI_CHECK(grid.size() == 4, name, " must be [total, chunk, world_size, slots], got ", grid.size(), " numbers");
    const int64_t total = grid[0], chunk = grid[1], world = grid[2], slots = grid[3];
    MAGI_CHECK(0 <= total && total < kMaxRows, name, ": total must be in [0, 2**29), got ", total);
    MAGI_CHECK(1 <= chunk && chunk < kMaxRows, name, ": chunk must be in [1, 2**29), got ", chunk);
    MAGI_CHECK(1 <= world && world < (1 << 20), name, ": world_size must be in [1, 2**20), got ", world);
    MAGI_CHECK(1 <= slots && world * slots < kMaxRows && world * slots * chunk >= total, name, ": ", slots,
               " slots of ", chunk, " rows on ", world, " ranks do not hold ", total, " rows");
    return {static_cast<int>(total), static_cast<int>(chunk), static_cast<int>(world), static_cast<int>(slots)};
}

plan::CostModel check_cost(const std::vector<double>& cost) {
    MAGI_CHECK(cost.size() == 11,
               "cost must be [cell, row, launch, exposed, traffic, slack, guest, returned, guest_backward, "
               "returned_backward, fill], got ",
               cost.size(), " numbers");
    return {cost[0], cost[1], cost[2], cost[3], cost[4], cost[5], cost[6], cost[7], cost[8], cost[9], cost[10]};
}

std::span<const int> check_chunks(const Tensor& chunks, const plan::Grid& grid, const char* name) {
    check_shape(chunks, {grid.world, grid.slots}, name, "[world_size, slots]");
    const std::span<const int> table(static_cast<const int*>(chunks.data_ptr()), static_cast<size_t>(grid.num_slots()));
    plan::check_ownership(grid, table, name);
    return table;
}

template <typename T>
Tensor table_of(const Tensor& like, const std::vector<T>& rows) {
    constexpr int64_t width = sizeof(T) / sizeof(int);
    Tensor out = new_empty(like, {static_cast<int64_t>(rows.size()), width}, ScalarType::Int);
    std::copy(rows.begin(), rows.end(), static_cast<T*>(out.data_ptr()));
    return out;
}

Tensor longs_of(const Tensor& like, const std::vector<int64_t>& values, std::vector<int64_t> shape) {
    Tensor out = new_empty(like, shape, ScalarType::Long);
    std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.data_ptr()));
    return out;
}

Tensor slices_area(const Tensor& slices) {
    const Tensor table = check_table(slices, 6, "slices");
    std::vector<int64_t> areas;
    for (const Slice& s : span_of(table)) areas.push_back(area(s));
    return longs_of(slices, areas, {slices.size(0)});
}

Tensor slices_overlap(const Tensor& slices) {
    const Tensor table = check_table(slices, 6, "slices");
    const auto [first, second] = plan::find_overlap(span_of(table));
    return longs_of(slices, {first, second}, {2});
}

// Masks of one length, weighted, that share an ownership.
plan::Demand check_masks(const std::vector<Tensor>& slices, const std::vector<double>& weights, const plan::Grid& grid,
                         int64_t total_k) {
    MAGI_CHECK(!slices.empty(), "slices must hold at least one mask, got none");
    MAGI_CHECK(slices.size() == weights.size(), "weights must be one number for each of ", slices.size(),
               " masks, got ", weights.size());
    MAGI_CHECK(0 <= total_k && total_k < kMaxRows, "total_k must be in [0, 2**29), got ", total_k);
    std::vector<Tensor> tables;
    std::vector<plan::WeightedMask> masks;
    for (size_t i = 0; i < slices.size(); ++i) {
        MAGI_CHECK(weights[i] > 0, "weights must be positive, got ", weights[i]);
        tables.push_back(check_host_slices(slices[i], grid.total, total_k));
        masks.push_back({span_of(tables.back()), weights[i]});
    }
    return plan::demand_of(masks, grid, static_cast<int>(total_k));
}

Tensor chunk_table(const Tensor& like, const plan::Ownership& chunks, const plan::Grid& grid) {
    Tensor out = new_empty(like, {grid.world, grid.slots}, ScalarType::Int);
    std::copy(chunks.begin(), chunks.end(), static_cast<int*>(out.data_ptr()));
    return out;
}

Tensor plan_ownership(std::vector<Tensor> slices, std::vector<double> weights, std::vector<int64_t> q_grid,
                      int64_t total_k, std::vector<double> cost) {
    const plan::Grid grid = check_grid(q_grid, "q_grid");
    const plan::Demand demand = check_masks(slices, weights, grid, total_k);
    return chunk_table(slices[0], plan::assign_chunks(demand, grid, check_cost(cost)), grid);
}

Tensor plan_key_ownership(std::vector<Tensor> slices, std::vector<double> weights, const Tensor& q_chunks,
                          std::vector<int64_t> q_grid, std::vector<int64_t> k_grid) {
    const plan::Grid q = check_grid(q_grid, "q_grid"), k = check_grid(k_grid, "k_grid");
    MAGI_CHECK(q.world == k.world, "k_grid must have the world_size of q_grid, ", q.world, ", got ", k.world);
    const plan::Demand demand = check_masks(slices, weights, q, k.total);
    const Tensor table = check_table(q_chunks, q.slots, "q_chunks");
    return chunk_table(slices[0], plan::assign_keys(demand, q, check_chunks(table, q, "q_chunks"), k), k);
}

// A mask whose rows and keys have owners.
struct PlanCall {
    plan::Grid q, k;
    Tensor slices, q_chunks, k_chunks;
    std::span<const int> q_owned, k_owned;
    plan::StageCounts stages;
    plan::CostModel cost;
    plan::Moves moves;

    plan::Tables tables(int rank) const {
        return plan::make_tables(span_of(slices), moves, q, q_owned, k, k_owned, rank, stages, cost);
    }
};

PlanCall check_plan(const Tensor& slices, const Tensor& q_chunks, const Tensor& k_chunks,
                    const std::vector<int64_t>& q_grid, const std::vector<int64_t>& k_grid,
                    const std::vector<int64_t>& stages, const std::vector<double>& cost,
                    const std::optional<Tensor>& moves) {
    MAGI_CHECK(stages.size() == 2, "stages must be [forward, backward], got ", stages.size(), " numbers");
    for (const int64_t count : stages) MAGI_CHECK(1 <= count && count <= 64, "stages must be in [1, 64], got ", count);
    PlanCall call{check_grid(q_grid, "q_grid"),
                  check_grid(k_grid, "k_grid"),
                  {},
                  {},
                  {},
                  {},
                  {},
                  {static_cast<int>(stages[0]), static_cast<int>(stages[1])},
                  check_cost(cost),
                  {}};
    MAGI_CHECK(call.q.world == call.k.world, "k_grid must have the world_size of q_grid, ", call.q.world, ", got ",
               call.k.world);
    call.slices = check_host_slices(slices, call.q.total, call.k.total);
    call.q_chunks = check_table(q_chunks, call.q.slots, "q_chunks");
    call.k_chunks = check_table(k_chunks, call.k.slots, "k_chunks");
    call.q_owned = check_chunks(call.q_chunks, call.q, "q_chunks");
    call.k_owned = check_chunks(call.k_chunks, call.k, "k_chunks");
    if (moves) {
        const Tensor table = check_table(*moves, 5, "moves");
        call.moves = plan::Moves({static_cast<const plan::Move*>(table.data_ptr()), static_cast<size_t>(table.size(0))},
                                 call.q.total, call.k.total, call.q.world);
    }
    return call;
}

// Of every rank: area, remote rows, guest rows, returned rows, and the key rows of each stage of each pass.
Tensor statistics_of(const Tensor& like, const std::vector<plan::RankStats>& ranks,
                     std::initializer_list<const std::vector<int64_t>*> passes) {
    std::vector<int64_t> out;
    for (size_t r = 0; r < ranks.size(); ++r) {
        out.insert(out.end(), {ranks[r].area, ranks[r].remote, ranks[r].guests, ranks[r].returned});
        for (const std::vector<int64_t>* rows : passes) {
            const auto stages = static_cast<std::ptrdiff_t>(rows->size() / ranks.size());
            const auto first = rows->begin() + static_cast<std::ptrdiff_t>(r) * stages;
            out.insert(out.end(), first, first + stages);
        }
    }
    const auto world = static_cast<int64_t>(ranks.size());
    return longs_of(like, out, {world, static_cast<int64_t>(out.size()) / world});
}

// Rectangles that are computed away from the owner of their rows because that is faster: int32 [n, 5], q0 q1 k0 k1
// rank.
Tensor plan_moves(const Tensor& slices, const Tensor& q_chunks, const Tensor& k_chunks, std::vector<int64_t> q_grid,
                  std::vector<int64_t> k_grid, std::vector<double> cost) {
    const PlanCall call = check_plan(slices, q_chunks, k_chunks, q_grid, k_grid, {1, 1}, cost, {});
    return table_of(slices,
                    plan::choose_moves(span_of(call.slices), call.q, call.q_owned, call.k, call.k_owned, call.cost));
}

// q_ranges, k_ranges, slices, statistics [world, 4 + all stages] (area, remote rows, guest rows, returned rows, rows of
// each stage); then for each stage, those of the forward first, slices, send_ranges, splits [2, world], recv_rows [n,
// 0], send_rows [n, 0]. With moves each stage ends with its guest_slices, and the same five tables of the guests stand
// in front of the stages.
std::vector<Tensor> plan_tables(const Tensor& slices, const Tensor& q_chunks, const Tensor& k_chunks,
                                std::vector<int64_t> q_grid, std::vector<int64_t> k_grid, int64_t rank,
                                std::vector<int64_t> stages, std::vector<double> cost, std::optional<Tensor> moves) {
    const PlanCall call = check_plan(slices, q_chunks, k_chunks, q_grid, k_grid, stages, cost, moves);
    const plan::Grid& q = call.q;
    MAGI_CHECK(0 <= rank && rank < q.world, "rank must be in [0, ", q.world, "), got ", rank);
    const plan::Tables tables = call.tables(static_cast<int>(rank));
    std::vector<Tensor> out = {table_of(slices, tables.q_ranges), table_of(slices, tables.k_ranges),
                               table_of(slices, tables.slices),
                               statistics_of(slices, tables.ranks, {&tables.forward.rows, &tables.backward.rows})};
    const auto push = [&](const std::vector<Slice>& part, const plan::Transfer& transfer) {
        out.push_back(table_of(slices, part));
        out.push_back(table_of(slices, transfer.send));
        out.push_back(longs_of(slices, transfer.splits, {2, q.world}));
        out.push_back(new_empty(slices, {transfer.num_recv(), 0}, ScalarType::Int));
        out.push_back(new_empty(slices, {transfer.num_send(), 0}, ScalarType::Int));
    };
    if (moves) push(tables.guest_slices, tables.guests);
    for (const plan::Schedule* pass : {&tables.forward, &tables.backward}) {
        for (const plan::StageTables& stage : pass->stages) {
            push(stage.slices, stage);
            if (moves) out.push_back(table_of(slices, stage.guest_slices));
        }
    }
    return out;
}

// The same over nodes: rows cross to a node once, and go on to the ranks inside. Each stage has splits [2, node_size]
// there, and four tables more, of the way between nodes: relay_ranges, relay_splits [2, nodes], relay_rows and
// relay_send_rows [n, 0].
std::vector<Tensor> plan_relay(const Tensor& slices, const Tensor& q_chunks, const Tensor& k_chunks,
                               std::vector<int64_t> q_grid, std::vector<int64_t> k_grid, int64_t rank,
                               int64_t node_size, std::vector<int64_t> stages, std::vector<double> cost) {
    const PlanCall call = check_plan(slices, q_chunks, k_chunks, q_grid, k_grid, stages, cost, {});
    const int64_t world = call.q.world;
    MAGI_CHECK(0 <= rank && rank < world, "rank must be in [0, ", world, "), got ", rank);
    MAGI_CHECK(1 <= node_size && world % node_size == 0, "node_size must divide the world size ", world, ", got ",
               node_size);
    const plan::RelayTables tables =
        plan::make_relay_tables(span_of(call.slices), call.q, call.q_owned, call.k, call.k_owned,
                                static_cast<int>(rank), static_cast<int>(node_size), call.stages, call.cost);
    std::vector<Tensor> out = {table_of(slices, tables.q_ranges), table_of(slices, tables.k_ranges),
                               table_of(slices, tables.slices),
                               statistics_of(slices, tables.ranks, {&tables.forward.rows, &tables.backward.rows})};
    const auto push = [&](const std::vector<Range>& ranges, const std::vector<int64_t>& splits) {
        const auto half = splits.begin() + static_cast<std::ptrdiff_t>(splits.size() / 2);
        out.push_back(table_of(slices, ranges));
        out.push_back(longs_of(slices, splits, {2, static_cast<int64_t>(splits.size() / 2)}));
        out.push_back(new_empty(slices, {std::accumulate(half, splits.end(), int64_t{0}), 0}, ScalarType::Int));
        out.push_back(new_empty(slices, {std::accumulate(splits.begin(), half, int64_t{0}), 0}, ScalarType::Int));
    };
    for (const plan::RelaySchedule* pass : {&tables.forward, &tables.backward}) {
        for (const plan::RelayStage& stage : pass->stages) {
            out.push_back(table_of(slices, stage.slices));
            push(stage.send, stage.splits);
            push(stage.relay_send, stage.relay_splits);
        }
    }
    return out;
}

// The work of a kernel on slices that ascend by their rows, in cells.
double slices_work(const Tensor& slices, std::vector<double> cost) {
    return check_cost(cost).work(span_of(check_table(slices, 6, "slices")));
}

// What every rank's tables say together, of one pass: key rows from source to destination in each stage, int64 [stages,
// world, world]; allowed cells that each rank computes in each stage, its own keys first, int64 [world, 1 + stages],
// guest rows with own keys in the first remote stage; number of slices, work in cells, and the guest rows' part of the
// work likewise.
std::vector<Tensor> survey_pass(const Tensor& like, const std::vector<plan::Tables>& ranks,
                                plan::Schedule plan::Tables::*pass, const plan::CostModel& cost) {
    const auto world = static_cast<int64_t>(ranks.size()),
               stages = static_cast<int64_t>((ranks[0].*pass).stages.size()), steps = 1 + stages;
    std::vector<int64_t> rows(stages * world * world);
    std::vector<int64_t> areas(world * steps), pieces(world * steps), works(world * steps), guest_works(world * steps);
    const auto add = [&](int64_t at, const std::vector<Slice>& part, bool guests) {
        for (const Slice& s : part) areas[at] += area(s);
        const double work = cost.work(part);
        pieces[at] += static_cast<int64_t>(part.size());
        works[at] += static_cast<int64_t>(work);
        if (guests) guest_works[at] += static_cast<int64_t>(work);
    };
    for (int64_t r = 0; r < world; ++r) {
        add(r * steps, ranks[r].slices, false);
        add(r * steps + 1, ranks[r].guest_slices, true);
        for (int64_t s = 0; s < stages; ++s) {
            const plan::StageTables& stage = (ranks[r].*pass).stages[s];
            add(r * steps + 1 + s, stage.slices, false);
            add(r * steps + 1 + s, stage.guest_slices, true);
            std::copy_n(stage.splits.begin(), world, rows.begin() + (s * world + r) * world);
        }
    }
    return {longs_of(like, rows, {stages, world, world}), longs_of(like, areas, {world, steps}),
            longs_of(like, pieces, {world, steps}), longs_of(like, works, {world, steps}),
            longs_of(like, guest_works, {world, steps})};
}

// Rows, areas, pieces, work and the guests' work of the forward, then of the backward; then the query rows of each rank
// that visit each other one, int64 [world, world].
std::vector<Tensor> plan_overview(const Tensor& slices, const Tensor& q_chunks, const Tensor& k_chunks,
                                  std::vector<int64_t> q_grid, std::vector<int64_t> k_grid, std::vector<int64_t> stages,
                                  std::vector<double> cost, std::optional<Tensor> moves) {
    const PlanCall call = check_plan(slices, q_chunks, k_chunks, q_grid, k_grid, stages, cost, moves);
    const int64_t world = call.q.world;
    std::vector<plan::Tables> ranks;
    for (int r = 0; r < call.q.world; ++r) ranks.push_back(call.tables(r));
    std::vector<Tensor> out = survey_pass(slices, ranks, &plan::Tables::forward, call.cost);
    for (const Tensor& table : survey_pass(slices, ranks, &plan::Tables::backward, call.cost)) out.push_back(table);
    std::vector<int64_t> visits;
    for (const plan::Tables& of : ranks)
        visits.insert(visits.end(), of.guests.splits.begin(), of.guests.splits.begin() + world);
    out.push_back(longs_of(slices, visits, {world, world}));
    return out;
}

}  // namespace
}  // namespace magi

STABLE_TORCH_LIBRARY_FRAGMENT(magi, m) {
    m.def("slices_area(Tensor slices) -> Tensor");
    m.def("slices_overlap(Tensor slices) -> Tensor");
    m.def("slices_work(Tensor slices, float[] cost) -> float");
    m.def("plan_ownership(Tensor[] slices, float[] weights, int[] q_grid, int total_k, float[] cost) -> Tensor");
    m.def(
        "plan_key_ownership(Tensor[] slices, float[] weights, Tensor q_chunks, int[] q_grid, int[] k_grid) -> Tensor");
    m.def(
        "plan_moves(Tensor slices, Tensor q_chunks, Tensor k_chunks, int[] q_grid, int[] k_grid, float[] cost) -> "
        "Tensor");
    m.def(
        "plan_tables(Tensor slices, Tensor q_chunks, Tensor k_chunks, int[] q_grid, int[] k_grid, int rank, int[] "
        "stages, float[] cost, Tensor? moves=None) -> Tensor[]");
    m.def(
        "plan_relay(Tensor slices, Tensor q_chunks, Tensor k_chunks, int[] q_grid, int[] k_grid, int rank, int "
        "node_size, int[] stages, float[] cost) -> Tensor[]");
    m.def(
        "plan_overview(Tensor slices, Tensor q_chunks, Tensor k_chunks, int[] q_grid, int[] k_grid, int[] stages, "
        "float[] cost, Tensor? moves=None) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(magi, CPU, m) {
    m.impl("slices_area", TORCH_BOX(&magi::slices_area));
    m.impl("slices_overlap", TORCH_BOX(&magi::slices_overlap));
    m.impl("slices_work", TORCH_BOX(&magi::slices_work));
    m.impl("plan_ownership", TORCH_BOX(&magi::plan_ownership));
    m.impl("plan_key_ownership", TORCH_BOX(&magi::plan_key_ownership));
    m.impl("plan_moves", TORCH_BOX(&magi::plan_moves));
    m.impl("plan_tables", TORCH_BOX(&magi::plan_tables));
    m.impl("plan_relay", TORCH_BOX(&magi::plan_relay));
    m.impl("plan_overview", TORCH_BOX(&magi::plan_overview));
}
