//! SVG text: a document that is readable on light and dark pages, and its few elements.
//!
//! Written by hand, as colours that follow the reader's theme need style rules, which plotting
//! crates do not write.

use std::fmt::{Display, Write};

/// Colours by theme. Elements name them by class.
const STYLE: &str = "\
svg { background: #ffffff; font: 13px system-ui, sans-serif; }
text { fill: #1f2328; }
.soft { fill: #59636e; }
.line { stroke: #d1d9e0; fill: none; }
.axis { stroke: #59636e; fill: none; }
.bar { fill: #0969da; }
.mark { stroke: #bc4c00; fill: none; }
.marked { fill: #bc4c00; }
.skip { fill: #eaeef2; }
.mixed { fill: #d4a72c; }
.free { fill: #0969da; }
.skip, .mixed, .free { shape-rendering: crispEdges; }
@media (prefers-color-scheme: dark) {
  svg { background: #0d1117; }
  text { fill: #f0f6fc; }
  .soft { fill: #9198a1; }
  .line { stroke: #3d444d; }
  .axis { stroke: #9198a1; }
  .bar { fill: #4493f8; }
  .mark { stroke: #f0883e; }
  .marked { fill: #f0883e; }
  .skip { fill: #212830; }
  .mixed { fill: #bb8009; }
  .free { fill: #4493f8; }
}";

/// A picture under construction.
#[derive(Debug)]
pub(crate) struct Svg {
    width: f64,
    height: f64,
    title: String,
    body: String,
}

/// Where a text stands relative to its point.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// Text as it may stand in an element or an attribute.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no way to write the others.
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

impl Svg {
    pub(crate) fn new(width: f64, height: f64, title: &str) -> Self {
        Self {
            width,
            height,
            title: escape(title),
            body: String::new(),
        }
    }

    fn element(&mut self, element: impl Display) {
        // Writing to a string does not fail.
        let _ = writeln!(self.body, "{element}");
    }

    pub(crate) fn rect(&mut self, class: &str, x: f64, y: f64, width: f64, height: f64) {
        self.element(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"/>"#
        ));
    }

    pub(crate) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        self.element(format_args!(
            r#"<line class="{class}" x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
            from.0, from.1, to.0, to.1
        ));
    }

    pub(crate) fn text(&mut self, class: &str, x: f64, y: f64, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        self.element(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(text)
        ));
    }

    /// The document.
    pub(crate) fn finish(self) -> String {
        let Self {
            width,
            height,
            title,
            body,
        } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
             width=\"{width:.0}\" height=\"{height:.0}\" role=\"img\">\n\
             <title>{title}</title>\n<style>\n{STYLE}\n</style>\n\
             <text x=\"16\" y=\"26\" font-size=\"15\" font-weight=\"600\">{title}</text>\n\
             {body}</svg>\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_break_out() {
        let mut svg = Svg::new(10.0, 10.0, "a < b & \"c\"");
        svg.text("soft", 0.0, 0.0, Anchor::Start, "</text>\u{1}");
        let text = svg.finish();
        assert!(text.contains("a &lt; b &amp; &quot;c&quot;"));
        assert!(text.contains(">&lt;/text&gt; </text>"));
    }
}
