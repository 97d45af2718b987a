//! Wrong calls: each gives the right error, which names the operand, what was expected and what was
//! given; it panics nowhere, encodes nothing and writes nothing. On every device that opens.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

#[path = "../common/mod.rs"]
mod common;
mod decode;
mod dispatch;
mod dispatch_other;
mod prefill;
mod problem;
mod things;
mod world;

use world::{Row, World};

/// Every table but that of raw dispatches, whose errors come from the commit.
fn tables() -> Vec<(&'static str, Vec<Row>)> {
    vec![
        ("prefill", prefill::rows()),
        ("masks and classes", prefill::pre_pass_rows()),
        ("decode", decode::rows()),
        ("attention", problem::attention_rows()),
        ("problem", problem::builder_rows()),
        ("packed", problem::packed_rows()),
        ("buffers and registries", things::rows()),
    ]
}

#[test]
fn wrong_calls_are_refused_and_leave_no_trace() {
    for device in common::devices() {
        let mut wrong = Vec::new();
        let mut rows = 0;
        for (table, row) in tables()
            .into_iter()
            .flat_map(|(t, r)| r.into_iter().map(move |r| (t, r)))
        {
            rows += 1;
            let mut world = World::new(&device);
            if let Err(why) = world.check(&row) {
                wrong.push(format!("{table}, {}: {why}", row.name));
            }
        }
        assert!(wrong.is_empty(), "{}: {wrong:#?}", device.name());
        assert!(rows >= 60, "{rows} rows");
        eprintln!("{}: {rows} wrong calls", device.name());
    }
}

#[test]
fn wrong_dispatches_fail_when_they_are_committed_and_write_nothing() {
    for device in common::devices() {
        let mut wrong = Vec::new();
        for row in dispatch::rows() {
            let mut world = World::new(&device);
            if let Err(why) = world.check_committed(&row) {
                wrong.push(format!("{}: {why}", row.name));
            }
        }
        assert!(wrong.is_empty(), "{}: {wrong:#?}", device.name());
    }
}

#[test]
fn the_calls_that_the_rows_spoil_are_right() {
    for device in common::devices() {
        for call in world::GOOD {
            let mut world = World::new(&device);
            call(&mut world).unwrap();
            assert!(!world.encoder.take_capture().unwrap().is_empty());
        }
    }
}
