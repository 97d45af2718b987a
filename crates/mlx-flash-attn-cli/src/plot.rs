//! The bar chart of `bench`.

use crate::svg::{Anchor, Svg};

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) value: f64,
    /// Worst and best value.
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// What stands after the bar.
    pub(crate) note: String,
}

/// A value that bars are compared with.
#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) label: String,
    pub(crate) value: f64,
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 230.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 74.0;
const STEP: f64 = 34.0;
const BAR: f64 = 20.0;

/// Horizontal bars with whiskers from worst to best; `bar_axis` names what a bar is, `value_axis`
/// what its length is.
pub(crate) fn bars(
    title: &str,
    bar_axis: &str,
    value_axis: &str,
    bars: &[Bar],
    reference: Option<&Reference>,
) -> String {
    let bottom = TOP + STEP * bars.len() as f64;
    let mut svg = Svg::new(WIDTH, bottom + 56.0, title);
    let largest = bars
        .iter()
        .map(|b| b.high)
        .chain(reference.map(|r| r.value))
        .filter(|x| x.is_finite())
        .fold(0.0, f64::max);
    let tick = tick(largest);
    let end = (largest / tick).ceil().max(1.0) * tick;
    let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * (value / end).clamp(0.0, 1.0);

    svg.text("soft", 16.0, TOP - 14.0, Anchor::Start, bar_axis);
    for i in 0..=(end / tick).round() as usize {
        let value = tick * i as f64;
        svg.line("line", (x(value), TOP), (x(value), bottom));
        let label = short(value);
        svg.text("soft", x(value), bottom + 18.0, Anchor::Middle, &label);
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    svg.text("", middle, bottom + 42.0, Anchor::Middle, value_axis);
    for (i, bar) in bars.iter().enumerate() {
        let y = TOP + STEP * i as f64 + (STEP - BAR) / 2.0;
        let (centre, baseline) = (y + BAR / 2.0, y + BAR / 2.0 + 4.5);
        svg.text("", LEFT - 10.0, baseline, Anchor::End, &bar.label);
        svg.rect("bar", LEFT, y, x(bar.value) - LEFT, BAR);
        svg.line("axis", (x(bar.low), centre), (x(bar.high), centre));
        for end in [bar.low, bar.high] {
            svg.line("axis", (x(end), centre - 4.0), (x(end), centre + 4.0));
        }
        svg.text(
            "soft",
            x(bar.high) + 8.0,
            baseline,
            Anchor::Start,
            &bar.note,
        );
    }
    if let Some(reference) = reference {
        let at = x(reference.value);
        svg.line("mark", (at, TOP - 6.0), (at, bottom));
        svg.text("marked", at, TOP - 12.0, Anchor::Middle, &reference.label);
    }
    svg.line("axis", (LEFT, TOP), (LEFT, bottom));
    svg.finish()
}

/// A round distance of which up to about six reach `largest`.
fn tick(largest: f64) -> f64 {
    if !(largest > 0.0 && largest.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf((largest / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|s| s * power);
    let fits = steps.into_iter().find(|s| largest / s <= 6.0);
    fits.unwrap_or(10.0 * power)
}

/// Without the digits that binary fractions leave behind.
fn short(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for largest in [0.003, 0.7, 1.0, 9.9, 37.0, 640.0, 1e6] {
            let t = tick(largest);
            assert!((2.0..=6.0).contains(&(largest / t)), "{largest}: {t}");
        }
        assert_eq!(tick(0.0), 1.0);
        assert_eq!(tick(f64::NAN), 1.0);
        assert_eq!(
            (short(0.30000000000000004), short(20.0)),
            ("0.3".into(), "20".into())
        );
    }
}
