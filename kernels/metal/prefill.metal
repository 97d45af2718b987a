// Tiled attention over one query tile of one head.
//
// A chunk of keys is worked on in three steps: each simdgroup multiplies all rows with its own keys
// (K straight from device memory, each element once); each takes its own rows through the online
// softmax (Milakov and Gimelshein 2018; Dao 2023, section 3.1); each multiplies all rows of P with
// its own columns of V (again each element once) into accumulators that stay in registers. Two
// barriers a chunk, three where P takes the place of S, and no staging of K or V.

// Geometry of a kernel: query rows of a tile, keys of a chunk, simdgroups.
template <typename T, int D_, int BQ_, int C_, int NSG_>
struct Geometry {
    static constant constexpr int D = D_;
    static constant constexpr int BQ = BQ_;
    static constant constexpr int C = C_;
    static constant constexpr int NSG = NSG_;
    // Rows of threadgroup tiles are padded by 16 bytes against bank conflicts.
    static constant constexpr int LDQ = D + 16 / int(sizeof(T));
    static constant constexpr int LDS = C + 4;
    // P takes the place of S where its elements are as wide.
    static constant constexpr bool IN_PLACE = sizeof(T) == 4;
    static constant constexpr int LDP = IN_PLACE ? LDS : C + 8;
    // Columns whose products are summed before they join the others: f32 has bits to lose in a long
    // chain of additions.
    static constant constexpr int RUN = sizeof(T) == 4 ? 32 : D;
    // Blocks of Q along D that each simdgroup keeps in registers for all chunks: all or none.
    static constant constexpr bool HOLDS_Q = BQ == 32 && D * int(sizeof(T)) <= 128;
    static constant constexpr int HELD = HOLDS_Q ? D / 8 : 1;
    static constant constexpr int ROW_BLOCKS = BQ / 8;
    static constant constexpr int KEY_BLOCKS = C / 8 / NSG;
    static constant constexpr int COLUMN_BLOCKS = (D / 8 + NSG - 1) / NSG;
    static constant constexpr int ROWS = BQ / NSG;
    static constant constexpr int LANES = 32 / ROWS;
    static constant constexpr int CELLS = C / LANES;
    // The tile that classes are computed over.
    static constant constexpr int CLASS_BQ = D >= 512 ? 8 : 32;
    static constant constexpr int CLASS_BK = D >= 512 ? 64 : 16;
};

// Which keys the rows of a tile see. Positions are 64-bit: offset plus row may pass 2^31.
struct Bounds {
    long offset;
    int window;
    int window_right;
    int keys;
};

inline bool sees(thread const Bounds& b, long row, long key) {
    const long p = row + b.offset;
    return (!do_causal || key <= p) && (b.window < 0 || p - key < b.window)
        && (b.window_right < 0 || key - p <= b.window_right);
}

// First and one past the last key that row `low` opens and row `high` closes: (first, last) row of a
// tile bounds the keys that some row sees, (last, first) those that every row sees.
inline int2 key_range(thread const Bounds& b, long low, long high) {
    const long n = b.keys;
    long start = 0, end = n;
    if (b.window >= 0) { start = clamp(low + b.offset - b.window + 1, 0L, n); }
    if (do_causal) { end = clamp(high + b.offset + 1, 0L, n); }
    if (b.window_right >= 0) { end = min(end, clamp(high + b.offset + b.window_right + 1, 0L, n)); }
    return int2(int(start), int(end));
}

template <typename T, bool is_bool>
inline float mask_cell(device const uchar* mask, long index) {
    if (is_bool) { return mask[index] != 0 ? 0.0f : -INFINITY; }
    if (mask_dtype == 1) { return reinterpret_cast<device const float*>(mask)[index]; }
    if (mask_dtype == 2) { return float(reinterpret_cast<device const half*>(mask)[index]); }
    if (mask_dtype == 3) { return float(reinterpret_cast<device const bfloat*>(mask)[index]); }
    return float(reinterpret_cast<device const T*>(mask)[index]);
}

// The operands of one tile, moved to its head and sequence.
template <typename T>
struct Operands {
    device const T* q;
    device const T* k;
    device const T* v;
    device T* o;
    device const uchar* mask;
    device const uchar* blk;
    device float* lse;
    long mask_base;
    long mask_stride;
    float sink;
    float slope;
};

// Classes of the chunk at k0: x is false where every tile of it is masked, y where none needs the
// mask.
template <typename G>
inline bool2 chunk_classes(device const uchar* blk, int q0, int k0, int keys) {
    const long across = (keys + G::CLASS_BK - 1) / G::CLASS_BK;
    const long first = long(q0 / G::CLASS_BQ) * across;
    bool some = false, masked = false;
    for (int t = k0 / G::CLASS_BK; t < (k0 + G::C) / G::CLASS_BK && t < across; ++t) {
        const uchar kind = blk[first + t];
        some |= kind != 0;
        masked |= kind != 2;
    }
    return bool2(some, masked);
}

template <typename T, typename G, bool is_bool>
inline void tile(
    constant AttnParams& p, thread const Operands<T>& at, thread const Bounds& bounds, int q0, int rows,
    threadgroup T* q_tile, threadgroup float* s_tile, threadgroup T* p_tile, threadgroup float* factors,
    ushort sg, ushort lane) {
    const Cell cell = lane_cell(lane);
    const long q_stride = p.Q_strides[2], k_stride = p.K_strides[2];
    const long v_stride = p.V_strides[2], o_stride = p.O_strides[2];
    const float softcap = p.softcapping;

    // Q, with zeros past the last row.
    for (int i = sg * 32 + lane; i < G::BQ * G::D; i += G::NSG * 32) {
        const int r = i / G::D, c = i % G::D;
        const bool there = align_q || r < rows;
        q_tile[r * G::LDQ + c] = there ? at.q[(q0 + r) * q_stride + c] : T(0.0f);
    }

    simdgroup_matrix<float, 8, 8> o[G::ROW_BLOCKS][G::COLUMN_BLOCKS];
    for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
        for (int j = 0; j < G::COLUMN_BLOCKS; ++j) { o[rb][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
    }

    // The row that this lane takes through the softmax, and its cells of a chunk.
    const int row = sg * G::ROWS + lane / G::LANES;
    const int cells = (lane % G::LANES) * G::CELLS;
    const bool leads = lane % G::LANES == 0;
    float running_max = has_sinks ? at.sink * LOG2E : LOWEST;
    float running_sum = has_sinks && leads ? 1.0f : 0.0f;
    bool seen = false;

    const float scale = has_softcap ? p.scale / softcap : p.scale * LOG2E;
    const int2 any = key_range(bounds, q0, q0 + rows - 1);
    const int2 all = key_range(bounds, q0 + rows - 1, q0);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_matrix<T, 8, 8> q_held[G::ROW_BLOCKS][G::HELD];
    for (int rb = 0; rb < G::ROW_BLOCKS && G::HOLDS_Q; ++rb) {
        for (int i = 0; i < G::HELD; ++i) {
            simdgroup_load(q_held[rb][i], q_tile + rb * 8 * G::LDQ + i * 8, G::LDQ);
        }
    }

    for (int k0 = any.x / G::C * G::C; k0 < any.y; k0 += G::C) {
        bool masked = has_mask;
        if (has_blk) {
            const bool2 classes = chunk_classes<G>(at.blk, q0, k0, bounds.keys);
            if (!classes.x) { continue; }
            masked = classes.y;
        }

        // S = Q K^T: all rows with this simdgroup's keys, a run of columns after the other.
        simdgroup_matrix<float, 8, 8> s[G::KEY_BLOCKS][G::ROW_BLOCKS];
        for (int d0 = 0; d0 < G::D; d0 += G::RUN) {
            simdgroup_matrix<float, 8, 8> part[G::KEY_BLOCKS][G::ROW_BLOCKS];
            for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) { part[kb][rb] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f); }
            }
            for (int d = d0; d < min(d0 + G::RUN, G::D); d += 8) {
                simdgroup_matrix<T, 8, 8> q_block[G::ROW_BLOCKS];
                for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    if (G::HOLDS_Q) {
                        q_block[rb] = q_held[rb][d / 8 % G::HELD];
                        continue;
                    }
                    simdgroup_load(q_block[rb], q_tile + rb * 8 * G::LDQ + d, G::LDQ);
                }
                for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                    const int key = k0 + (sg * G::KEY_BLOCKS + kb) * 8;
                    const int there = bounds.keys - key;
                    if (there <= 0) { continue; }
                    simdgroup_matrix<T, 8, 8> k_block;
                    load_block<T, true>(k_block, at.k + key * k_stride + d, k_stride, align_k ? 8 : there, cell);
                    for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                        simdgroup_multiply_accumulate(part[kb][rb], q_block[rb], k_block, part[kb][rb]);
                    }
                }
            }
            for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    for (ushort e = 0; e < 2; ++e) {
                        const float sum = part[kb][rb].thread_elements()[e];
                        s[kb][rb].thread_elements()[e] = d0 == 0 ? sum : s[kb][rb].thread_elements()[e] + sum;
                    }
                }
            }
        }
        // Other simdgroups may still be reading the last chunk's P there.
        if (G::IN_PLACE) { threadgroup_barrier(mem_flags::mem_threadgroup); }
        for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
            for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                const int column = (sg * G::KEY_BLOCKS + kb) * 8;
                simdgroup_store(s[kb][rb], s_tile + rb * 8 * G::LDS + column, G::LDS);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Softmax: this simdgroup's rows over the whole chunk.
        const bool bounded = k0 < all.x || k0 + G::C > all.y;
        const bool real_row = align_q || row < rows;
        const long mask_row = at.mask_base + long(row) * at.mask_stride;
        float x[G::CELLS];
        float chunk_max = running_max;
        for (int c = 0; c < G::CELLS; ++c) {
            const int key = k0 + cells + c;
            float value = s_tile[row * G::LDS + cells + c] * scale;
            if (has_softcap) { value = precise::tanh(value) * (softcap * LOG2E); }
            if (has_alibi) { value -= at.slope * LOG2E * float(abs(q0 + row + bounds.offset - key)); }
            if (bounded && (key >= bounds.keys || !sees(bounds, q0 + row, key))) {
                value = -INFINITY;
            } else if (masked && real_row) {
                value += LOG2E * mask_cell<T, is_bool>(at.mask, mask_row + key);
            }
            x[c] = value;
            chunk_max = max(chunk_max, value);
        }
        for (ushort step = 1; step < G::LANES; step *= 2) {
            chunk_max = max(chunk_max, simd_shuffle_xor(chunk_max, step));
        }
        const float factor = fast::exp2(running_max - chunk_max);
        running_max = chunk_max;
        running_sum *= factor;
        for (int c = 0; c < G::CELLS; ++c) {
            seen |= x[c] > -INFINITY;
            const float weight = fast::exp2(x[c] - chunk_max);
            running_sum += weight;
            p_tile[row * G::LDP + cells + c] = T(weight);
        }
        if (leads) { factors[row] = factor; }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // O = diag(factor) O + P V: all rows with this simdgroup's columns.
        for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            const float f = factors[rb * 8 + cell.row];
            for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
                o[rb][j].thread_elements()[0] *= f;
                o[rb][j].thread_elements()[1] *= f;
            }
        }
        for (int kb = 0; kb < G::C / 8; ++kb) {
            const int key = k0 + kb * 8;
            const int there = bounds.keys - key;
            if (there <= 0) { break; }
            simdgroup_matrix<T, 8, 8> p_block[G::ROW_BLOCKS];
            for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                simdgroup_load(p_block[rb], p_tile + rb * 8 * G::LDP + kb * 8, G::LDP);
            }
            for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
                const int column = (j * G::NSG + sg) * 8;
                if (column >= G::D) { break; }
                simdgroup_matrix<T, 8, 8> v_block;
                load_block<T, false>(v_block, at.v + key * v_stride + column, v_stride, align_k ? 8 : there, cell);
                for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    simdgroup_multiply_accumulate(o[rb][j], p_block[rb], v_block, o[rb][j]);
                }
            }
        }
    }

    for (ushort step = 1; step < G::LANES; step *= 2) {
        running_sum += simd_shuffle_xor(running_sum, step);
        seen |= simd_shuffle_xor(uint(seen), step) != 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (leads) {
        factors[row] = seen ? 1.0f / running_sum : 0.0f;
        if (has_lse && row < rows) {
            at.lse[q0 + row] = seen ? (running_max + precise::log2(running_sum)) * LN2 : -INFINITY;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
        const int r = rb * 8 + cell.row;
        if (!align_q && r >= rows) { continue; }
        const float inverse = factors[r];
        device T* out = at.o + (q0 + r) * o_stride;
        for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            const int column = (j * G::NSG + sg) * 8 + cell.col;
            if (column >= G::D) { break; }
            out[column] = T(o[rb][j].thread_elements()[0] * inverse);
            out[column + 1] = T(o[rb][j].thread_elements()[1] * inverse);
        }
    }
}

// One threadgroup a query tile: grid (tiles, heads, batch), threads (32, simdgroups, 1).
// ALIAS tells apart kernels that differ by name alone.
template <typename T, int D, int BQ, int C, int NSG, bool is_bool, int ALIAS>
[[kernel, max_total_threads_per_threadgroup(32 * NSG)]] void prefill(
    device const T* q [[buffer(0)]],
    device const T* k [[buffer(1)]],
    device const T* v [[buffer(2)]],
    device T* o [[buffer(3)]],
    constant AttnParams& p [[buffer(4)]],
    constant AttnMaskParams& mask_params [[buffer(5), function_constant(has_mask)]],
    device const uchar* mask [[buffer(6), function_constant(has_mask)]],
    device const uchar* blk [[buffer(7), function_constant(has_blk)]],
    constant AttnExtraParams& extra [[buffer(8), function_constant(has_extra)]],
    device const float* sinks [[buffer(9), function_constant(has_sinks)]],
    device const float* slopes [[buffer(10), function_constant(has_alibi)]],
    device float* lse [[buffer(11), function_constant(has_lse)]],
    constant uint* cu_seqlens_q [[buffer(12), function_constant(is_varlen)]],
    constant uint* cu_seqlens_k [[buffer(13), function_constant(is_varlen)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort sg [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
    using G = Geometry<T, D, BQ, C, NSG>;
    threadgroup T q_tile[BQ * G::LDQ];
    threadgroup float s_tile[BQ * G::LDS];
    threadgroup T p_tile[G::IN_PLACE ? 4 : BQ * G::LDP];
    threadgroup float factors[BQ];

    // The last tiles see the most keys under causal visibility, so they go first.
    const int q0 = (p.NQ - 1 - int(group.x)) * BQ;
    const long head = group.y, kv_head = head / p.gqa_factor;
    long batch = group.z, q_start = 0, k_start = 0;
    int queries = p.qL;
    Bounds bounds{p.qL_off, -1, -1, p.kL};
    if (is_varlen) {
        q_start = cu_seqlens_q[batch];
        k_start = cu_seqlens_k[batch];
        queries = int(cu_seqlens_q[batch + 1] - cu_seqlens_q[batch]);
        bounds.keys = int(cu_seqlens_k[batch + 1] - cu_seqlens_k[batch]);
        if (extra.bottom_right != 0) { bounds.offset = bounds.keys - queries; }
        batch = 0;
    }
    if (has_window) {
        bounds.window = extra.window;
        bounds.window_right = extra.window_right;
    }
    const int rows = min(BQ, queries - q0);
    if (rows <= 0) { return; }

    Operands<T> at;
    at.q = q + batch * p.Q_strides[0] + head * p.Q_strides[1] + q_start * p.Q_strides[2];
    at.k = k + batch * p.K_strides[0] + kv_head * p.K_strides[1] + k_start * p.K_strides[2];
    at.v = v + batch * p.V_strides[0] + kv_head * p.V_strides[1] + k_start * p.V_strides[2];
    at.o = o + batch * p.O_strides[0] + head * p.O_strides[1] + q_start * p.O_strides[2];
    if (has_mask) {
        at.mask = mask;
        at.mask_stride = mask_params.M_strides[2];
        at.mask_base = batch * mask_params.M_strides[0] + head * mask_params.M_strides[1]
            + (q_start + q0) * at.mask_stride;
    }
    if (has_blk) { at.blk = blk; }
    if (has_lse) { at.lse = lse + batch * extra.L_strides[0] + head * extra.L_strides[1] + q_start; }
    at.sink = has_sinks ? sinks[head] : 0.0f;
    at.slope = has_alibi ? slopes[head] : 0.0f;

    threadgroup T* weights = G::IN_PLACE ? reinterpret_cast<threadgroup T*>(s_tile) : p_tile;
    if (NSG == 8 && nsg == 4) {
        using Narrow = Geometry<T, D, BQ, C, 4>;
        tile<T, Narrow, is_bool>(p, at, bounds, q0, rows, q_tile, s_tile, weights, factors, sg, lane);
    } else {
        tile<T, G, is_bool>(p, at, bounds, q0, rows, q_tile, s_tile, weights, factors, sg, lane);
    }
}

#define PREFILL(name, T, D, BQ, C, NSG, is_bool, alias)        \
    template [[host_name(name)]] [[kernel]] decltype(          \
        prefill<T, D, BQ, C, NSG, is_bool, alias>)             \
        prefill<T, D, BQ, C, NSG, is_bool, alias>;
#define MASKS(stem, T, D, BQ, C, NSG, alias)                   \
    PREFILL("flash_attn_prefill_" stem, T, D, BQ, C, NSG, false, alias) \
    PREFILL("flash_attn_prefill_" stem "_boolmask", T, D, BQ, C, NSG, true, alias)

// One line a dtype and head dim: a host hands its compiler the line that it needs, without the others.
MASKS("bf16_d32", bfloat, 32, 32, 32, 4, 0)
MASKS("f16_d32", half, 32, 32, 32, 4, 0)
MASKS("bf16_d64", bfloat, 64, 32, 32, 4, 0)
MASKS("f16_d64", half, 64, 32, 32, 4, 0)
MASKS("bf16_d80", bfloat, 80, 32, 32, 4, 0)
MASKS("f16_d80", half, 80, 32, 32, 4, 0)
MASKS("bf16_d96", bfloat, 96, 32, 32, 4, 0)
MASKS("f16_d96", half, 96, 32, 32, 4, 0)
MASKS("bf16_d128", bfloat, 128, 32, 32, 4, 0)
MASKS("f16_d128", half, 128, 32, 32, 4, 0)
MASKS("bf16_d192", bfloat, 192, 32, 32, 4, 0)
MASKS("f16_d192", half, 192, 32, 32, 4, 0)
MASKS("bf16_d256", bfloat, 256, 32, 32, 4, 0)
MASKS("f16_d256", half, 256, 32, 32, 4, 0)
MASKS("bf16_d512", bfloat, 512, 8, 64, 8, 0)
MASKS("f16_d512", half, 512, 8, 64, 8, 0)
MASKS("llamacpp_bf16_d512", bfloat, 512, 8, 64, 8, 1)
MASKS("llamacpp_f16_d512", half, 512, 8, 64, 8, 1)
MASKS("f32_d32", float, 32, 32, 32, 4, 0)
MASKS("f32_d64", float, 64, 32, 32, 4, 0)
MASKS("f32_d80", float, 80, 32, 32, 4, 0)
MASKS("f32_d96", float, 96, 32, 32, 4, 0)
MASKS("f32_d128", float, 128, 32, 32, 4, 0)
MASKS("f32_d192", float, 192, 32, 32, 4, 0)
MASKS("f32_d256", float, 256, 8, 64, 8, 0)
MASKS("f32_d512", float, 512, 8, 64, 8, 0)
MASKS("llamacpp_f32_d512", float, 512, 8, 64, 8, 1)
