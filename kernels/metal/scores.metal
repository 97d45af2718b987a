// The unit of scores, and what a score weighs.

// Scores are kept in units of 2 ln 2: a natural unit is this constant. In these units every finite mask
// and sink is finite in f32, which in log2 units overflows above 2.4e38.
constant constexpr float HALF_LOG2E = LOG2E / 2.0f;

// Start of a running maximum: the lowest finite number, so that no score is below it and maximum minus
// maximum is never infinity minus infinity.
constant constexpr float LOWEST = -FLT_MAX;

// The weight of a score, given how far it lies from the maximum.
METAL_FUNC float weight_at(float distance) { return fast::exp2(distance + distance); }
