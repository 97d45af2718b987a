// 8x8 matrices of a simdgroup.
//
// A lane's object holds its two elements and the number of the operation whose result it is. The
// first lane to reach an operation computes it for all 32; the others, passing later, pick up
// their two elements. Only an operand that lanes have changed element by element (through
// thread_elements) makes the operation wait until every lane has brought its share.
#pragma once

namespace msl_rt {

// The lane map: lane l holds (row, col) and (row, col + 1). Undocumented by Apple; as observed on
// the M1 to M4 families. The offset is row * 8 + col.
static constexpr uchar lane_offset[MSL_LANES] = {0,  2,  8,  10, 16, 18, 24, 26, 4,  6,  12,
                                                 14, 20, 22, 28, 30, 32, 34, 40, 42, 48, 50,
                                                 56, 58, 36, 38, 44, 46, 52, 54, 60, 62};

struct Operand {
  float e[2];
  uint id; // 0: the elements are the lanes' own
};

enum ElementType : uint { ELEMENT_FLOAT, ELEMENT_HALF, ELEMENT_BFLOAT };

MSL_FN bool in_ring(const Simd *s, uint id) { return id != 0 && s->head + 8u - id < MSL_RING; }

// A lane may not run further ahead than the ring is long.
__attribute__((noinline)) static void wait_for_slow_lanes(Worker *w, Simd *s, uint seq, uint op, uint line) {
  Lane *me = w->lane;
  for (;;) {
    uint low = me->seq;
    for (uint i = 0; i < s->count; i++) low = s->lanes[i].seq < low ? s->lanes[i].seq : low;
    s->min_seq = low;
    if (seq + 8u < low + MSL_RING) return;
    me->op = op;
    me->line = line;
    if (s->ready == me->bit) stuck(w);
    run_next(w);
    me->op = OP_NONE;
  }
}

// Begins (or joins) an operation. True for the lane that must compute it, with every operand whole
// in the ring; all lanes call end_op after.
static bool begin_op(Worker *w, uint op, uint line, const void *ptr, Operand *const *in, uint n) {
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  MatrixOp &o = s->ops[seq % MSL_RING];
  if (me->seq == s->head) {
    if (__builtin_expect(seq + 8u >= s->min_seq + MSL_RING, 0)) wait_for_slow_lanes(w, s, seq, op, line);
  }
  if (me->seq == s->head) {
    uint gather = 0, extra = 0;
    for (uint i = 0; i < n; i++) {
      if (!in_ring(s, in[i]->id)) gather |= 1u << i, extra++;
    }
    o.kind = op;
    o.line = line;
    o.ptr = ptr;
    o.gather = gather;
    o.arrived = 0;
    s->head = seq + extra;
    if (!gather) return true;
  } else if (__builtin_expect(o.kind != op || o.line != line, 0)) {
    Fault &f = fault_at(w, FAULT_DIVERGENCE, line);
    f.op = op;
    f.other_op = o.kind;
    f.other_line = o.line;
    leave(w);
  } else if (__builtin_expect(o.ptr != ptr, 0)) {
    fault_at(w, FAULT_OPERANDS, line).op = op;
    leave(w);
  }
  if (!o.gather) return false;
  const uint at = lane_offset[me->lane];
  uint k = 0;
  for (uint i = 0; i < n; i++) {
    if (!(o.gather >> i & 1u)) continue;
    k++;
    float *d = s->data[(seq + k) % MSL_RING] + at;
    d[0] = in[i]->e[0];
    d[1] = in[i]->e[1];
    in[i]->id = seq + k;
  }
  if (++o.arrived < s->count) {
    block(w, op, line);
    return false;
  }
  s->ready = s->present;
  return true;
}

MSL_FN void end_op(Worker *w, Operand *out) {
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  const uint gather = s->ops[seq % MSL_RING].gather;
  if (out) {
    const float *d = s->data[seq % MSL_RING] + lane_offset[me->lane];
    out->e[0] = d[0];
    out->e[1] = d[1];
    out->id = seq;
  }
  me->seq = seq + static_cast<uint>(__builtin_popcount(gather));
}

static void round_elements(float *d, uint type) {
  if (type == ELEMENT_HALF) {
    for (int i = 0; i < 64; i++) d[i] = static_cast<float>(static_cast<half>(d[i]));
  } else if (type == ELEMENT_BFLOAT) {
    for (int i = 0; i < 64; i++) d[i] = bfloat(d[i]);
  }
}

static void multiply_8x8(float *d, const float *a, const float *b, const float *c) {
#pragma clang fp contract(fast)
  float8v rows[8];
  for (int k = 0; k < 8; k++) rows[k] = *reinterpret_cast<const float8v *>(b + 8 * k);
  for (int i = 0; i < 8; i++) {
    float8v sum = c ? *reinterpret_cast<const float8v *>(c + 8 * i) : float8v(0.0f);
    for (int k = 0; k < 8; k++) sum = sum + float8v(a[8 * i + k]) * rows[k];
    *reinterpret_cast<float8v *>(d + 8 * i) = sum;
  }
}

__attribute__((noinline)) static void matrix_multiply(Operand *d, Operand *a, Operand *b, Operand *c, uint type,
                                                      uint line) {
  Worker *w = worker();
  Operand *const in[3] = {a, b, c};
  if (begin_op(w, OP_MULTIPLY, line, nullptr, in, c ? 3 : 2)) {
    Simd *s = w->lane->simd;
    float *r = s->data[(w->lane->seq + 1u) % MSL_RING];
    multiply_8x8(r, s->data[a->id % MSL_RING], s->data[b->id % MSL_RING],
                 c ? s->data[c->id % MSL_RING] : nullptr);
    round_elements(r, type);
    w->counts.multiplies++;
  }
  end_op(w, d);
}

__attribute__((noinline)) static void matrix_fill(Operand *d, float v, bool diagonal, uint line) {
  Worker *w = worker();
  // The value stands in for a pointer: lanes must agree on it.
  const ulong key = static_cast<ulong>(__builtin_bit_cast(uint, v)) << 1 | (diagonal ? 1u : 0u);
  if (begin_op(w, OP_FILL, line, reinterpret_cast<const void *>(key), nullptr, 0)) {
    float *r = w->lane->simd->data[(w->lane->seq + 1u) % MSL_RING];
    for (int i = 0; i < 64; i++) r[i] = !diagonal || i % 9 == 0 ? v : 0.0f;
  }
  end_op(w, d);
}

struct Tile {
  ulong row;    // elements from one row to the next
  ulong column; // and from one column to the next
  ulong first;
};
MSL_FN Tile tile_of(ulong per_row, ulong ox, ulong oy, bool transpose) {
  Tile t;
  t.row = transpose ? 1 : per_row;
  t.column = transpose ? per_row : 1;
  t.first = transpose ? ox * per_row + oy : oy * per_row + ox;
  return t;
}

static void check_tile(Worker *w, const uchar *p, const Tile &t, uint size, bool write, uint line) {
  for (ulong r = 0; r < 8; r++) {
    if (t.column == 1) {
      const ulong at = reinterpret_cast<ulong>(p) + (t.first + r * t.row) * size;
      check_access(w, at, 8 * size, write, false, true, 0, line);
      continue;
    }
    for (ulong c = 0; c < 8; c++) {
      const ulong at = reinterpret_cast<ulong>(p) + (t.first + r * t.row + c * t.column) * size;
      check_access(w, at, size, write, false, true, 0, line);
    }
  }
}

template <class T>
static void read_tile(float *d, const T *p, const Tile &t) {
  p += t.first;
  if (t.column == 1) {
    for (ulong r = 0; r < 8; r++)
      for (ulong c = 0; c < 8; c++) d[8 * r + c] = static_cast<float>(p[r * t.row + c]);
  } else {
    for (ulong c = 0; c < 8; c++)
      for (ulong r = 0; r < 8; r++) d[8 * r + c] = static_cast<float>(p[r + c * t.column]);
  }
}

template <class T>
static void write_tile(const float *d, T *p, const Tile &t) {
  p += t.first;
  for (ulong r = 0; r < 8; r++)
    for (ulong c = 0; c < 8; c++) p[r * t.row + c * t.column] = static_cast<T>(d[8 * r + c]);
}

template <class T>
__attribute__((noinline)) static void matrix_load(Operand *d, const T *p, ulong per_row, ulong ox, ulong oy,
                                                  bool transpose, uint line) {
  Worker *w = worker();
  const Tile t = tile_of(per_row, ox, oy, transpose);
  if (begin_op(w, OP_LOAD, line, p + t.first, nullptr, 0)) {
    if (w->launch->checked) check_tile(w, reinterpret_cast<const uchar *>(p), t, sizeof(T), false, line);
    read_tile(w->lane->simd->data[(w->lane->seq + 1u) % MSL_RING], p, t);
  }
  end_op(w, d);
}

template <class T>
__attribute__((noinline)) static void matrix_store(Operand *a, T *p, ulong per_row, ulong ox, ulong oy,
                                                   bool transpose, uint line) {
  Worker *w = worker();
  const Tile t = tile_of(per_row, ox, oy, transpose);
  Operand *const in[1] = {a};
  if (begin_op(w, OP_STORE, line, p + t.first, in, 1)) {
    if (w->launch->checked) check_tile(w, reinterpret_cast<const uchar *>(p), t, sizeof(T), true, line);
    write_tile(w->lane->simd->data[a->id % MSL_RING], p, t);
  }
  end_op(w, nullptr);
}

} // namespace msl_rt
