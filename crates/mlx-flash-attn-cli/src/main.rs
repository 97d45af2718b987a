//! The program `mlx-flash-attn`.
fn main() {}
