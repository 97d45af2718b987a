//! Kernel argument attributes that name a position or a size in the grid, and the shim types that fetch
//! them.

/// The shim type that fetches the attribute `name`, or none where it is no grid attribute.
pub(super) fn fetcher(name: &str) -> Option<&'static str> {
    Some(match name {
        "thread_position_in_grid" => "ArgThreadInGrid",
        "threadgroup_position_in_grid" => "ArgGroupInGrid",
        "thread_position_in_threadgroup" => "ArgThreadInGroup",
        "thread_index_in_threadgroup" => "ArgIndexInGroup",
        "thread_index_in_simdgroup" => "ArgIndexInSimd",
        "simdgroup_index_in_threadgroup" => "ArgSimdInGroup",
        "threads_per_threadgroup" | "dispatch_threads_per_threadgroup" => "ArgThreadsPerGroup",
        "threadgroups_per_grid" => "ArgGroupsPerGrid",
        "threads_per_grid" => "ArgThreadsPerGrid",
        "simdgroups_per_threadgroup" | "dispatch_simdgroups_per_threadgroup" => "ArgSimdsPerGroup",
        "threads_per_simdgroup" | "thread_execution_width" => "ArgThreadsPerSimd",
        "quadgroup_index_in_threadgroup" => "ArgQuadInGroup",
        "thread_index_in_quadgroup" => "ArgIndexInQuad",
        _ => return None,
    })
}
