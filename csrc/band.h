// What is one slice of a mask? A rectangle of (q, k) cells with a diagonal band: lo <= k - q <= hi, both inclusive.
// Host and device. The only C++ place that knows the four mask type codes.
#pragma once

#ifdef __CUDACC__
#define MAGI_HD __host__ __device__ __forceinline__
#else
#define MAGI_HD inline
#endif

namespace magi {

// Public shorthand: bit 0 bounds the band from above (bottom-right aligned), bit 1 from below (top-left aligned).
enum MaskType { kFull = 0, kCausal = 1, kInvCausal = 2, kBiCausal = 3 };

// Rows and keys are below kMaxRows, so that every difference k - q, and every bound moved by one, fits an int.
constexpr int kMaxRows = 1 << 29;
constexpr int kNoLo = -(1 << 30);  // no lower bound
constexpr int kNoHi = 1 << 30;     // no upper bound

struct Slice {
    int q0, q1, k0, k1, lo, hi;  // one row of the int32 tensor slices [n, 6]
};

enum TileClass { kTileEmpty, kTilePartial, kTileFull };

MAGI_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
MAGI_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }

MAGI_HD constexpr Slice slice_of(int q0, int q1, int k0, int k1, int type) {
    return {q0, q1, k0, k1, type & kInvCausal ? k0 - q0 : kNoLo, type & kCausal ? k1 - q1 : kNoHi};
}

MAGI_HD constexpr bool in_band(const Slice& s, int q, int k) { return k - q >= s.lo && k - q <= s.hi; }

// A crop keeps the band: it only intersects the ranges.
MAGI_HD constexpr Slice crop(const Slice& s, int q0, int q1, int k0, int k1) {
    return {max_of(s.q0, q0), min_of(s.q1, q1), max_of(s.k0, k0), min_of(s.k1, k1), s.lo, s.hi};
}

// A move shifts the band by a constant; an absent bound stays absent.
MAGI_HD constexpr Slice shift(const Slice& s, int dq, int dk) {
    return {s.q0 + dq,
            s.q1 + dq,
            s.k0 + dk,
            s.k1 + dk,
            s.lo <= kNoLo ? kNoLo : s.lo + dk - dq,
            s.hi >= kNoHi ? kNoHi : s.hi + dk - dq};
}

// The same cells with q and k exchanged (what a walk over k tiles sees).
MAGI_HD constexpr Slice transpose(const Slice& s) {
    return {s.k0, s.k1, s.q0, s.q1, s.hi >= kNoHi ? kNoLo : -s.hi, s.lo <= kNoLo ? kNoHi : -s.lo};
}

// First and one-past-last key that row range [q0, q1) of the slice can see; begin >= end where it sees none.
struct Range {
    int begin, end;
};
MAGI_HD constexpr Range keys_of_rows(const Slice& s, int q0, int q1) {
    return {s.lo <= kNoLo ? s.k0 : max_of(s.k0, q0 + s.lo), s.hi >= kNoHi ? s.k1 : min_of(s.k1, q1 + s.hi)};
}
MAGI_HD constexpr Range rows_of_keys(const Slice& s, int k0, int k1) { return keys_of_rows(transpose(s), k0, k1); }

// The smallest rectangle that holds every allowed cell; empty ranges where there is none.
MAGI_HD constexpr Slice hull(const Slice& s) {
    const Range k = keys_of_rows(s, s.q0, s.q1);
    const Range q = rows_of_keys(s, s.k0, s.k1);
    const Slice h = crop(s, q.begin, q.end, k.begin, k.end);
    const bool empty = h.q0 >= h.q1 || h.k0 >= h.k1 || h.lo > h.hi;
    return empty ? Slice{s.q0, s.q0, s.k0, s.k0, s.lo, s.hi} : h;
}

// How the band meets a non-empty tile [q0, q1) x [k0, k1) that lies inside the slice's rectangle: two comparisons.
MAGI_HD constexpr TileClass classify(const Slice& s, int q0, int q1, int k0, int k1) {
    const int least = k0 - (q1 - 1), most = k1 - 1 - q0;
    return most < s.lo || least > s.hi ? kTileEmpty : least >= s.lo && most <= s.hi ? kTileFull : kTilePartial;
}

// Cells of a num_q x num_k rectangle at the origin with k - q <= t: a ramp that saturates at both ends.
MAGI_HD constexpr long long cells_up_to(long long num_q, long long num_k, long long t) {
    // Row q holds clamp(q + t + 1, 0, num_k) cells; it is positive from row -t on and saturated from row num_k - t - 1
    // on.
    const long long first = t < 0 ? -t : 0;
    const long long rising_end = num_k - t - 1;
    const long long a = first < num_q ? first : num_q;
    const long long unclamped = rising_end > a ? rising_end : a;
    const long long b = unclamped < num_q ? unclamped : num_q;
    return (b - a) * (t + 1) + (a + b - 1) * (b - a) / 2 + (num_q - b) * num_k;
}

// Allowed cells of a slice, in closed form.
MAGI_HD constexpr long long area(const Slice& s) {
    if (s.q1 <= s.q0 || s.k1 <= s.k0 || s.lo > s.hi) return 0;
    const long long nq = s.q1 - s.q0, nk = s.k1 - s.k0, origin = (long long)s.k0 - s.q0;
    return cells_up_to(nq, nk, s.hi - origin) - cells_up_to(nq, nk, s.lo - 1 - origin);
}

}  // namespace magi
