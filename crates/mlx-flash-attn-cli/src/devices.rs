//! `devices`: what there is and what each can do.

use anyhow::Result;
use mlx_flash_attn::{DeviceKind, MlxDevice, MlxError};

use crate::cli::DevicesArgs;
use crate::json::DeviceLine;
use crate::output::{Results, Status, message};
use crate::table::Fields;

pub(crate) fn execute(args: &DevicesArgs, results: &mut Results) -> Result<Status> {
    let default = match MlxDevice::new() {
        Ok(device) => Some(device.kind()),
        Err(error) => {
            message(format_args!("note: no device opens by default: {error}"));
            None
        }
    };
    for (i, kind) in DeviceKind::ALL.into_iter().enumerate() {
        let line = describe(kind, default);
        if args.json {
            results.json(&line)?;
        } else {
            if i > 0 {
                results.line("")?;
            }
            results.text(&for_people(&line))?;
        }
    }
    Ok(Status::Done)
}

fn describe(kind: DeviceKind, default: Option<DeviceKind>) -> DeviceLine {
    let opened = MlxDevice::open(kind);
    DeviceLine {
        device: kind.name(),
        available: opened.is_ok(),
        default: default == Some(kind),
        name: opened.as_ref().ok().map(MlxDevice::name),
        details: opened.as_ref().map(MlxDevice::details).unwrap_or_default(),
        reason: opened.err().map(|error| match error {
            MlxError::DeviceUnavailable { reason, .. } => reason,
            other => other.to_string(),
        }),
    }
}

fn for_people(line: &DeviceLine) -> String {
    let mut fields = Fields::default();
    let default = if line.default { ", the default" } else { "" };
    match (&line.name, &line.reason) {
        (Some(name), _) => fields.add(line.device, format_args!("{name}{default}")),
        (None, Some(reason)) => fields.add(line.device, format_args!("not available: {reason}")),
        (None, None) => fields.add(line.device, "not available"),
    }
    for (what, value) in &line.details {
        fields.add(&format!("  {what}"), value);
    }
    fields.to_string()
}
