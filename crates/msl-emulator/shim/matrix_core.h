// 8x8 matrices of a simdgroup.
//
// A lane's object holds its two elements and the number of the operation whose result it is. The
// first lane to reach an operation computes it for all 32; the others, passing later, pick up
// their two elements. Only an operand that lanes have changed element by element (through
// thread_elements) makes the operation wait until every lane has brought its share.
#pragma once

namespace metal {

// The type of a matrix's thread_elements(). Apple's has 64 elements, of which a lane's own are the first
// two; a vector of two converts neither to it nor from it. Only those two are stored here.
template <class T> struct vec<T, 64> {
  vec<T, 2> msl_own;
  MSL_INLINE T &operator[](int i) { return msl_own[i]; }
  MSL_INLINE const T &operator[](int i) const { return msl_own[i]; }
};

} // namespace metal

namespace msl_rt {

// The lane map: lane l holds (row, col) and (row, col + 1). Undocumented by Apple; as observed on
// the M1 to M4 families. The offset is row * 8 + col.
static constexpr uchar lane_offset[MSL_LANES] = {0,  2,  8,  10, 16, 18, 24, 26, 4,  6,  12,
                                                 14, 20, 22, 28, 30, 32, 34, 40, 42, 48, 50,
                                                 56, 58, 36, 38, 44, 46, 52, 54, 60, 62};

enum ElementType : uint { ELEMENT_FLOAT, ELEMENT_HALF, ELEMENT_BFLOAT };
template <class T> struct element_type;
template <> struct element_type<float> { static constexpr uint value = ELEMENT_FLOAT; };
template <> struct element_type<half> { static constexpr uint value = ELEMENT_HALF; };
template <> struct element_type<bfloat> { static constexpr uint value = ELEMENT_BFLOAT; };

// What a lane holds of a matrix.
template <class T> struct Share {
  metal::vec<T, 64> e;
  mutable uint id = 0; // 0: the elements are the lanes' own
};

// An operand of any type.
struct Operand {
  const void *e;
  uint *id;
  uint type;
};
template <class T> MSL_FN Operand operand(const Share<T> *m) {
  Operand o;
  o.e = &m->e;
  o.id = &m->id;
  o.type = element_type<T>::value;
  return o;
}

typedef float float2v __attribute__((ext_vector_type(2)));
typedef half half2v __attribute__((ext_vector_type(2)));

// Two elements from the ring, where they are rounded already.
MSL_FN void narrow(const float *d, metal::vec<float, 2> *e) { __builtin_memcpy(e, d, 8); }
MSL_FN void narrow(const float *d, metal::vec<half, 2> *e) {
  float2v f;
  __builtin_memcpy(&f, d, 8);
  const half2v h = __builtin_convertvector(f, half2v);
  __builtin_memcpy(e, &h, 4);
}
MSL_FN void narrow(const float *d, metal::vec<bfloat, 2> *e) {
  ulong u;
  __builtin_memcpy(&u, d, 8);
  const uint pair = static_cast<uint>(u >> 16 & 0xffffu) | static_cast<uint>(u >> 32 & 0xffff0000u);
  __builtin_memcpy(e, &pair, 4);
}
static void widen(const Operand &o, float *d) {
  for (int i = 0; i < 2; i++) {
    d[i] = o.type == ELEMENT_FLOAT  ? static_cast<const float *>(o.e)[i]
           : o.type == ELEMENT_HALF ? static_cast<float>(static_cast<const half *>(o.e)[i])
                                    : static_cast<float>(static_cast<const bfloat *>(o.e)[i]);
  }
}

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
__attribute__((noinline)) static bool begin_op(Worker *w, uint op, uint line, const void *ptr, const Operand *in,
                                               uint n) {
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
      if (!in_ring(s, *in[i].id)) gather |= 1u << i, extra++;
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
    widen(in[i], s->data[(seq + k) % MSL_RING] + at);
    *in[i].id = seq + k;
  }
  if (++o.arrived < s->count) {
    block(w, op, line);
    return false;
  }
  s->ready = s->present;
  return true;
}

// Whether another lane has computed this operation already, with nothing for this one to bring.
MSL_FN bool passed(const Lane *me, const Simd *s, uint op, uint line, const void *ptr) {
  const MatrixOp &o = s->ops[(me->seq + 1u) % MSL_RING];
  return me->seq != s->head && o.kind == op && o.line == line && o.ptr == ptr && !o.gather;
}

template <class T> MSL_FN void take(Lane *me, const Simd *s, uint seq, Share<T> *out) {
  narrow(s->data[seq % MSL_RING] + lane_offset[me->lane], &out->e.msl_own);
  out->id = seq;
}

// A reference from thread_elements() that outlived an operation was written through: the other
// lanes would not see it.
template <class T> static void verify(Worker *w, uint op, uint line, const Share<T> *m) {
  const Simd *s = w->lane->simd;
  if (!in_ring(s, m->id)) return;
  metal::vec<T, 2> e;
  narrow(s->data[m->id % MSL_RING] + lane_offset[w->lane->lane], &e);
  if (__builtin_memcmp(&e, &m->e, sizeof(e)) == 0) return;
  fault_at(w, FAULT_STALE, line).op = op;
  leave(w);
}

// Goes past the operation.
MSL_FN void end_op(Lane *me, const Simd *s, uint seq) {
  me->seq = seq + static_cast<uint>(__builtin_popcount(s->ops[seq % MSL_RING].gather));
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

__attribute__((noinline)) static void join_multiply(Worker *w, uint seq, const Operand *in, bool add, uint type,
                                                    uint line) {
  if (!begin_op(w, OP_MULTIPLY, line, nullptr, in, add ? 3 : 2)) return;
  Simd *s = w->lane->simd;
  float *r = s->data[seq % MSL_RING];
  multiply_8x8(r, s->data[*in[0].id % MSL_RING], s->data[*in[1].id % MSL_RING],
               add ? s->data[*in[2].id % MSL_RING] : nullptr);
  round_elements(r, type);
  w->counts.multiplies++;
}

// `c` may be null.
template <class D, class A, class B, class C>
__attribute__((noinline)) static void matrix_multiply(Share<D> *d, const Share<A> *a, const Share<B> *b,
                                                      const Share<C> *c, uint line) {
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  if (w->launch->checked) {
    verify(w, OP_MULTIPLY, line, a);
    verify(w, OP_MULTIPLY, line, b);
    if (c) verify(w, OP_MULTIPLY, line, c);
  }
  if (passed(me, s, OP_MULTIPLY, line, nullptr)) {
    take(me, s, seq, d);
    me->seq = seq;
    return;
  }
  const Operand in[3] = {operand(a), operand(b), c ? operand(c) : operand(a)};
  join_multiply(w, seq, in, c != nullptr, element_type<D>::value, line);
  take(me, s, seq, d);
  end_op(me, s, seq);
}

template <class T>
__attribute__((noinline)) static void matrix_fill(Share<T> *d, float v, bool diagonal, uint line) {
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  // The value stands in for a pointer: lanes must agree on it.
  const void *key = reinterpret_cast<const void *>(static_cast<ulong>(__builtin_bit_cast(uint, v)) << 1 |
                                                   (diagonal ? 1u : 0u));
  if (!passed(me, s, OP_FILL, line, key) && begin_op(w, OP_FILL, line, key, nullptr, 0)) {
    float *r = s->data[seq % MSL_RING];
    for (int i = 0; i < 64; i++) r[i] = !diagonal || i % 9 == 0 ? v : 0.0f;
  }
  take(me, s, seq, d);
  me->seq = seq;
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

typedef half half8v __attribute__((ext_vector_type(8)));
typedef ushort ushort8v __attribute__((ext_vector_type(8)));
typedef uint uint8v __attribute__((ext_vector_type(8)));

// Rows of eight, at any address.
MSL_FN void read_row(float *d, const float *p) { __builtin_memcpy(d, p, 32); }
MSL_FN void read_row(float *d, const half *p) {
  half8v h;
  __builtin_memcpy(&h, p, 16);
  *reinterpret_cast<float8v *>(d) = __builtin_convertvector(h, float8v);
}
MSL_FN void read_row(float *d, const bfloat *p) {
  ushort8v b;
  __builtin_memcpy(&b, p, 16);
  const uint8v u = __builtin_convertvector(b, uint8v) << 16;
  __builtin_memcpy(d, &u, 32);
}

template <class T> static void read_tile(float *d, const T *p, const Tile &t) {
  p += t.first;
  if (t.column == 1) {
    for (ulong r = 0; r < 8; r++) read_row(d + 8 * r, p + r * t.row);
  } else {
    alignas(64) float rows[64];
    for (ulong c = 0; c < 8; c++) read_row(rows + 8 * c, p + c * t.column);
    for (ulong r = 0; r < 8; r++)
      for (ulong c = 0; c < 8; c++) d[8 * r + c] = rows[8 * c + r];
  }
}

template <class T> static void write_tile(const float *d, T *p, const Tile &t) {
  p += t.first;
  for (ulong r = 0; r < 8; r++)
    for (ulong c = 0; c < 8; c++) p[r * t.row + c * t.column] = static_cast<T>(d[8 * r + c]);
}

template <class T>
__attribute__((noinline)) static void join_load(Worker *w, uint seq, const T *p, const Tile &t, uint line) {
  if (!begin_op(w, OP_LOAD, line, p + t.first, nullptr, 0)) return;
  if (w->launch->checked) check_tile(w, reinterpret_cast<const uchar *>(p), t, sizeof(T), false, line);
  read_tile(w->lane->simd->data[seq % MSL_RING], p, t);
}

template <class T>
__attribute__((noinline)) static void matrix_load(Share<T> *d, const T *p, ulong per_row, ulong ox, ulong oy,
                                                  bool transpose, uint line) {
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  const Tile t = tile_of(per_row, ox, oy, transpose);
  if (!passed(me, s, OP_LOAD, line, p + t.first)) join_load(w, seq, p, t, line);
  take(me, s, seq, d);
  me->seq = seq;
}

template <class T>
__attribute__((noinline)) static void join_store(Worker *w, const Operand &in, T *p, const Tile &t, uint line) {
  if (!begin_op(w, OP_STORE, line, p + t.first, &in, 1)) return;
  if (w->launch->checked) check_tile(w, reinterpret_cast<const uchar *>(p), t, sizeof(T), true, line);
  write_tile(w->lane->simd->data[*in.id % MSL_RING], p, t);
}

template <class T>
__attribute__((noinline)) static void matrix_store(const Share<T> *a, T *p, ulong per_row, ulong ox, ulong oy,
                                                   bool transpose, uint line) {
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  const uint seq = me->seq + 1u;
  const Tile t = tile_of(per_row, ox, oy, transpose);
  if (w->launch->checked) verify(w, OP_STORE, line, a);
  if (passed(me, s, OP_STORE, line, p + t.first)) {
    me->seq = seq;
    return;
  }
  join_store(w, operand(a), p, t, line);
  end_op(me, s, seq);
}

} // namespace msl_rt
