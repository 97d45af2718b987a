//! Progress on stderr: shown on a terminal, hidden otherwise and beside JSON.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

fn styled(bar: ProgressBar, template: &str) -> ProgressBar {
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

fn target(hidden: bool) -> ProgressDrawTarget {
    if hidden {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    }
}

/// A bar over `len` steps, with an estimate of the time left.
pub(crate) fn bar(len: u64, what: &str, hidden: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len), target(hidden));
    let bar = styled(bar, "{msg} [{bar:30}] {percent:>3} %, {eta} left");
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A sign of life for work of unknown length.
pub(crate) fn spinner(what: String, hidden: bool) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target(hidden));
    let bar = styled(bar, "{spinner} {msg}, {elapsed}");
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
