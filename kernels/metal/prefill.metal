// Tiled attention over one query tile of one head.
//
// A chunk of keys is worked on in three steps: each simdgroup multiplies all rows with its own keys
// (K straight from device memory, each element once); each takes its own rows through the online
// softmax (Milakov and Gimelshein 2018; Dao 2023, section 3.1); each multiplies all rows of P with
// its own columns of V (again each element once) into accumulators that stay in registers. Two
// barriers a chunk, three where P takes the place of S, and no staging of K or V.

// Computes one query tile. The first pass takes K and V as they are. Where a row's sum or output is not finite, it
// stores nothing and returns false, and the caller runs a `careful` pass: in that pass a key that is hidden from a row
// does not change the row, even if its K or V holds NaN or infinities, and all other rows get the same bits as in
// the first pass.
template <typename T, typename G, bool is_bool>
METAL_FUNC bool tile(
    constant AttnParams& p, thread const Operands<T>& at, thread const Bounds& bounds, int q0, int rows,
    threadgroup float* q_words, threadgroup float* s_tile, threadgroup T* p_tile, threadgroup float* factors,
    ushort sg, ushort lane, bool careful) {
    threadgroup T* q_tile = reinterpret_cast<threadgroup T*>(q_words);
    const Cell cell = lane_cell(lane);
    const long q_stride = p.Q_strides[2], o_stride = p.O_strides[2];
    const float softcap = p.softcapping;

    // Q, with zeros past the last row.
    for (int i = sg * 32 + lane; i < G::BQ * G::D; i += G::NSG * 32) {
        const int r = i / G::D, c = i % G::D;
        const bool there = align_q || r < rows;
        q_tile[r * G::LDQ + c] = there ? at.q[(q0 + r) * q_stride + c] : T(0.0f);
    }

    Accumulators<G> o;
    UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
        UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            o.block[rb][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }

    // The row that this lane takes through the softmax, and its cells of a chunk, which lie in one class
    // tile.
    const int row = sg * G::ROWS + lane / G::LANES;
    const int cells = (lane % G::LANES) * G::CELLS;
    const bool leads = lane % G::LANES == 0;
    // A sink of -infinity is none; any other that is not finite makes the sum NaN.
    float running_max = has_sinks ? max(at.sink * HALF_LOG2E, LOWEST) : LOWEST;
    float running_sum = has_sinks && leads && at.sink != -INFINITY ? 1.0f + (at.sink - at.sink) : 0.0f;
    bool seen = false;
    bool worked = false;

    const float unclamped = has_softcap ? p.scale / softcap : p.scale * HALF_LOG2E;
    const float scale = clamp(unclamped, LOWEST, -LOWEST);
    // Distances are below 2^33, so that their products stay finite.
    const float slope = clamp(at.slope * HALF_LOG2E, -0x1p94f, 0x1p94f);
    const int2 any = key_range(bounds, q0, q0 + rows - 1);
    const int2 all = key_range(bounds, q0 + rows - 1, q0);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_matrix<T, 8, 8> q_held[G::ROW_BLOCKS][G::HELD];
    if (G::HOLDS_Q) {
        UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            UNROLL for (int i = 0; i < G::HELD; ++i) {
                simdgroup_load(q_held[rb][i], q_tile + rb * 8 * G::LDQ + i * 8, G::LDQ);
            }
        }
    }

    NO_UNROLL for (int k0 = any.x / G::C * G::C; k0 < any.y; k0 += G::C) {
        bool masked = has_mask, hides = false;
        if (has_blk) {
            const int classes = chunk_classes<G>(at.blk, at.blk_across, q0, k0);
            if (classes == 0) { continue; }
            const int kind = (classes >> (cells / G::CLASS_BK * 2)) & 3;
            masked = kind == CLASS_MIXED;
            hides = kind == CLASS_SKIP;
        }
        worked = true;

        // S = Q K^T: all rows with this simdgroup's keys. Products are summed over G::RUN columns at a time before they
        // join S: shorter chains of additions round less.
        simdgroup_matrix<float, 8, 8> s[G::KEY_BLOCKS][G::ROW_BLOCKS];
        NO_UNROLL for (int d0 = 0; d0 < G::D; d0 += G::RUN) {
            simdgroup_matrix<float, 8, 8> part[G::KEY_BLOCKS][G::ROW_BLOCKS];
            UNROLL for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    part[kb][rb] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
                }
            }
            UNROLL_BY(G::HOLDS_Q ? G::HELD : 4) for (int d = d0; d < min(d0 + G::RUN, G::D); d += 8) {
                simdgroup_matrix<T, 8, 8> q_block[G::ROW_BLOCKS];
                UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    if (G::HOLDS_Q) {
                        q_block[rb] = q_held[rb][d / 8 % G::HELD];
                    } else {
                        simdgroup_load(q_block[rb], q_tile + rb * 8 * G::LDQ + d, G::LDQ);
                    }
                }
                UNROLL for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                    const int key = k0 + (sg * G::KEY_BLOCKS + kb) * 8;
                    const int there = bounds.keys - key;
                    if (there <= 0) { continue; }
                    simdgroup_matrix<T, 8, 8> k_block;
                    load_block<T, true>(k_block, at.k, key, d, align_k ? 8 : there, cell);
                    UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                        simdgroup_multiply_accumulate(part[kb][rb], q_block[rb], k_block, part[kb][rb]);
                    }
                }
            }
            UNROLL for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
                UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                    UNROLL for (ushort e = 0; e < 2; ++e) {
                        const float sum = part[kb][rb].thread_elements()[e];
                        s[kb][rb].thread_elements()[e] = d0 == 0 ? sum : s[kb][rb].thread_elements()[e] + sum;
                    }
                }
            }
        }
        // Other simdgroups may still be reading the last chunk's P there.
        if (G::IN_PLACE) { threadgroup_barrier(mem_flags::mem_threadgroup); }
        UNROLL for (int kb = 0; kb < G::KEY_BLOCKS; ++kb) {
            UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
                const int column = (sg * G::KEY_BLOCKS + kb) * 8;
                simdgroup_store(s[kb][rb], s_tile + rb * 8 * G::LDS + column, G::LDS);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Softmax: this simdgroup's rows over the whole chunk.
        const bool bounded = k0 < all.x || k0 + G::C > all.y;
        const bool real_row = align_q || row < rows;
        const long mask_row = at.mask_base + long(row) * at.mask_stride;
        threadgroup float* s_row = s_tile + row * G::LDS + cells;
        if (careful && real_row) {
            const float limit = -LOWEST / 4.0f / max(abs(scale), 1.0f);
            NO_UNROLL for (int c = 0; c < G::CELLS; ++c) {
                const int key = k0 + cells + c;
                if (!sees_cell<T, G, is_bool>(at, bounds, q0, row, key)) { continue; }
                device const T* k_row = kv_row(at.k, key);
                s_row[c] = finite_score<T>(s_row[c], limit, q_tile + row * G::LDQ, k_row, G::D);
            }
        }
        float x[G::CELLS];
        float chunk_max = running_max;
        UNROLL for (int c = 0; c < G::CELLS; ++c) {
            const int key = k0 + cells + c;
            float value = score_scaled(s_row[c], scale);
            if (has_softcap) { value = score_softcapped(value, softcap * HALF_LOG2E); }
            if (has_alibi) { value = score_alibi(value, slope, score_distance(q0 + row + bounds.offset, long(key))); }
            bool hidden = hides || (bounded && (key >= bounds.keys || !sees(bounds, q0 + row, key)));
            if (masked && real_row && !hidden) {
                const float bias = mask_cell<T, is_bool>(at.mask, mask_row + key);
                hidden = score_cell_hides(bias);
                value = score_masked(value, bias, HALF_LOG2E);
            }
            x[c] = score_if_seen(value, !hidden);
            seen |= !hidden;
            chunk_max = max(chunk_max, x[c]);
        }
        for (ushort step = 1; step < G::LANES; step *= 2) {
            chunk_max = max(chunk_max, simd_shuffle_xor(chunk_max, step));
        }
        const float factor = weight_at(running_max - chunk_max);
        running_max = chunk_max;
        running_sum *= factor;
        UNROLL for (int c = 0; c < G::CELLS; ++c) {
            const float weight = weight_at(x[c] - chunk_max);
            running_sum += weight;
            p_tile[row * G::LDP + cells + c] = T(weight);
        }
        if (leads) { factors[row] = factor; }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // O = diag(factor) O + P V: all rows with this simdgroup's columns.
        UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            const float f = factors[rb * 8 + cell.row];
            UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
                o.block[rb][j].thread_elements()[0] *= f;
                o.block[rb][j].thread_elements()[1] *= f;
            }
        }
        if (careful) {
            add_values<true, T, G>(o, at, k0, bounds.keys, p_tile, cell, sg);
        } else {
            add_values<false, T, G>(o, at, k0, bounds.keys, p_tile, cell, sg);
        }
    }

    for (ushort step = 1; step < G::LANES; step *= 2) {
        running_sum += simd_shuffle_xor(running_sum, step);
        seen |= simd_shuffle_xor(uint(seen), step) != 0;
    }
    // Nobody reads Q's tile any more once a chunk has been worked on. It takes each row's 1 / sum, and
    // for each simdgroup whether it has met a value that is not finite.
    threadgroup float* inverses = q_words;
    threadgroup float* broken = q_words + G::BQ;
    if (worked) {
        // Zero, or NaN where a product with zero is.
        float probe = 0.0f;
        UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
            const bool real = align_q || rb * 8 + cell.row < rows;
            UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
                if (!real || no_block<G>(block_column<G>(j, sg))) { break; }
                probe += o.block[rb][j].thread_elements()[0] * 0.0f;
                probe += o.block[rb][j].thread_elements()[1] * 0.0f;
            }
        }
        const bool sum_fails = row < rows && seen && !(running_sum > 0.0f && running_sum < INFINITY);
        const bool fails = simd_any(probe != 0.0f || sum_fails);
        if (lane == 0) { broken[sg] = fails ? 1.0f : 0.0f; }
        if (leads) { inverses[row] = seen && running_sum != 0.0f ? 1.0f / running_sum : 0.0f; }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (!careful) {
            if (simd_any(lane < G::NSG && broken[lane] != 0.0f)) {
                // The next pass writes Q over what the others still read.
                threadgroup_barrier(mem_flags::mem_threadgroup);
                return false;
            }
        } else {
            add_infinite_values<T, G, is_bool>(o, at, bounds, any, q0, rows, cell, sg);
        }
    }

    if (has_lse && leads && row < rows) {
        const float lse = running_max * (2.0f * LN2) + precise::log2(running_sum) * LN2;
        at.lse[q0 + row] = !seen ? -INFINITY : isinf(lse) ? copysign(-LOWEST, lse) : lse;
    }
    UNROLL for (int rb = 0; rb < G::ROW_BLOCKS; ++rb) {
        const int r = rb * 8 + cell.row;
        if (!align_q && r >= rows) { continue; }
        const float inverse = worked ? inverses[r] : 0.0f;
        device T* out = at.o + (q0 + r) * o_stride;
        UNROLL for (int j = 0; j < G::COLUMN_BLOCKS; ++j) {
            const int column = block_column<G>(j, sg);
            if (no_block<G>(column)) { break; }
            out[column + cell.col] = T(o.block[rb][j].thread_elements()[0] * inverse);
            out[column + cell.col + 1] = T(o.block[rb][j].thread_elements()[1] * inverse);
        }
    }
    return true;
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
    constant uint* cu_seqlens_q [[buffer(12), function_constant(has_cu_q)]],
    constant uint* cu_seqlens_k [[buffer(13), function_constant(is_varlen)]],
    device const int* block_table [[buffer(14), function_constant(is_paged)]],
    device const uint* key_lengths [[buffer(15), function_constant(has_key_lengths)]],
    constant AttnPagesParams& pages [[buffer(16), function_constant(is_paged)]],
    uint3 group [[threadgroup_position_in_grid]],
    ushort sg [[simdgroup_index_in_threadgroup]],
    ushort lane [[thread_index_in_simdgroup]]) {
    using G = Geometry<T, D, BQ, C, NSG>;
    threadgroup float q_words[G::Q_WORDS];
    threadgroup float s_tile[BQ * G::LDS];
    threadgroup T p_tile[G::IN_PLACE ? 4 : BQ * G::LDP];
    threadgroup float factors[BQ];

    // The last tiles see the most keys under causal visibility, so they go first.
    const int q0 = (p.NQ - 1 - int(group.x)) * BQ;
    const long head = group.y, kv_head = head / p.gqa_factor;
    const long sequence = group.z;
    long batch = sequence, k_batch = sequence, q_start = 0, k_start = 0;
    int queries = p.qL;
    Bounds bounds{p.qL_off, -1, -1, p.kL};
    if (has_cu_q) {
        q_start = cu_seqlens_q[sequence];
        queries = int(cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence]);
        batch = 0;
    }
    if (is_varlen) {
        k_start = cu_seqlens_k[sequence];
        bounds.keys = int(cu_seqlens_k[sequence + 1] - cu_seqlens_k[sequence]);
        k_batch = 0;
    }
    if (has_key_lengths) { bounds.keys = int(min(key_lengths[sequence], uint(p.kL))); }
    if ((has_cu_q || has_key_lengths) && extra.bottom_right != 0) { bounds.offset = bounds.keys - queries; }
    if (is_paged) { k_batch = 0; }
    if (has_window) {
        bounds.window = extra.window;
        bounds.window_right = extra.window_right;
    }
    const int rows = min(BQ, queries - q0);
    if (rows <= 0) { return; }

    Operands<T> at;
    at.q = q + batch * p.Q_strides[0] + head * p.Q_strides[1] + q_start * p.Q_strides[2];
    at.k.first = k + k_batch * p.K_strides[0] + kv_head * p.K_strides[1] + k_start * p.K_strides[2];
    at.v.first = v + k_batch * p.V_strides[0] + kv_head * p.V_strides[1] + k_start * p.V_strides[2];
    at.k.stride = p.K_strides[2];
    at.v.stride = p.V_strides[2];
    if (is_paged) {
        at.k.page_stride = p.K_strides[0];
        at.v.page_stride = p.V_strides[0];
        at.k.table = at.v.table = block_table + sequence * pages.per_sequence;
        at.k.shift = at.v.shift = pages.shift;
        at.k.pages = at.v.pages = uint(pages.count);
    }
    at.o = o + batch * p.O_strides[0] + head * p.O_strides[1] + q_start * p.O_strides[2];
    if (has_mask) {
        at.mask = mask;
        at.mask_stride = mask_params.M_strides[2];
        at.mask_base = batch * mask_params.M_strides[0] + head * mask_params.M_strides[1]
            + (q_start + q0) * at.mask_stride;
    }
    if (has_blk) {
        at.blk = blk;
        at.blk_across = (p.kL + G::CLASS_BK - 1) / G::CLASS_BK;
    }
    if (has_lse) { at.lse = lse + batch * extra.L_strides[0] + head * extra.L_strides[1] + q_start; }
    at.sink = has_sinks ? sinks[head] : 0.0f;
    at.slope = has_alibi ? slopes[head] : 0.0f;

    threadgroup T* weights = G::IN_PLACE ? reinterpret_cast<threadgroup T*>(s_tile) : p_tile;
    bool done = false;
    NO_UNROLL for (int pass = 0; pass < 2 && !done; ++pass) {
        if (NSG == 8 && nsg == 4) {
            using Narrow = Geometry<T, D, BQ, C, 4>;
            done = tile<T, Narrow, is_bool>(
                p, at, bounds, q0, rows, q_words, s_tile, weights, factors, sg, lane, pass != 0);
        } else {
            done = tile<T, G, is_bool>(
                p, at, bounds, q0, rows, q_words, s_tile, weights, factors, sg, lane, pass != 0);
        }
    }
}

#define PREFILL(name, T, D, BQ, C, NSG, is_bool, alias)        \
    template [[host_name(name)]] [[kernel]] decltype(          \
        prefill<T, D, BQ, C, NSG, is_bool, alias>)             \
        prefill<T, D, BQ, C, NSG, is_bool, alias>;
#define MASKS(stem, T, D, BQ, C, NSG, alias)                   \
    PREFILL("flash_attn_prefill_" stem, T, D, BQ, C, NSG, false, alias) \
    PREFILL("flash_attn_prefill_" stem "_boolmask", T, D, BQ, C, NSG, true, alias)

// The host appends a line MASKS(stem, T, D, BQ, C, NSG, alias) for each dtype and head dim of its table, and hands
// a compiler the line that it needs, without the others.
