// Joins partial results that decode.cu left, in f32: for each row and split its values, its maximum and its sum. A warp
// a row. Macro: D.

extern "C" __global__ void __launch_bounds__(128) combine(const __grid_constant__ Params p) {
    const i64 row = i64(blockIdx.x) * 4 + threadIdx.x / 32, rows = p.rows;
    const int lane = threadIdx.x % 32;
    if (row >= rows * p.heads * p.result_batch) return;
    const i64 bh = row / rows, i = row - bh * rows, b = bh / p.heads, h = bh - b * p.heads;
    const float* partials = p.partials + row * p.splits * (D + 2);
    float m = NEG_INF;
    for (int s = 0; s < p.splits; s++) m = fmaxf(m, partials[i64(s) * (D + 2) + D]);
    const float subtract = finite_max(m);
    float sum = 0.0f;
    for (int s = 0; s < p.splits; s++) {
        const float* split = partials + i64(s) * (D + 2);
        sum += expf(split[D] - subtract) * split[D + 1];
    }
    const Finish f = finish(m, sum, p.sinks, int(h));
    const i64 out = p.o_strides[0] * b + p.o_strides[1] * h + p.o_strides[2] * i;
    for (int d = lane; d < D; d += 32) {
        float x = 0.0f;
        for (int s = 0; s < p.splits; s++) {
            const float* split = partials + i64(s) * (D + 2);
            x += expf(split[D] - subtract) * split[D + 1] * split[d];
        }
        x *= f.factor;
        ((float*)p.o)[out + d] = x;
    }
    if (p.lse && lane == 0) p.lse[p.lse_strides[0] * b + p.lse_strides[1] * h + i] = f.lse;
}
