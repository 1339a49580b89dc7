//! The end that has the bytes, for throughput and for faults over QUIC.
//!
//! Role: a process that makes an image and serves it over plain quinn and as a pageferry peer, so that both send the same pages from the same memory.
//! Neighbours: `plain_quinn` and `quic` are what it speaks. Invariants: as `far_end`; each listener has a thread and a runtime of its own.

use super::{
    Result,
    far_end::{FarEnd, answer, field},
    pages::Image,
    plain_quinn, raw,
};
use serde_json::{Value, json};

/// The role of the far end.
pub const ROLE: &str = "server";

/// What the server's pages hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Content {
    Incompressible,
    VmLike,
}

impl Content {
    pub fn image(self, bytes: u64, seed: u64) -> Image {
        match self {
            Content::Incompressible => Image::incompressible(bytes, seed),
            Content::VmLike => Image::vm_like(bytes, seed),
        }
    }
}

/// The near end's handle.
pub struct Server {
    far_end: FarEnd,
    image: Image,
}

impl Server {
    pub fn start(content: Content, bytes: u64, seed: u64) -> Result<Server> {
        let mut far_end = FarEnd::start(ROLE)?;
        far_end.ask(&json!({ "ask": "fill", "vm_like": content == Content::VmLike, "bytes": bytes, "seed": seed }))?;
        Ok(Server { far_end, image: content.image(bytes, seed) })
    }

    /// What it serves.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Starts a listener; the answer says how to reach it.
    pub fn listen(&mut self, what: &str, mut options: Value) -> Result<Value> {
        options["ask"] = what.into();
        self.far_end.ask(&options)
    }

    /// CPU seconds of the server's process and of this one so far.
    pub fn cpu_of_both_s(&mut self) -> Result<f64> {
        Ok(raw::cpu_s() + self.far_end.cpu_s()?)
    }
}

/// The far end.
pub fn far_end() -> Result<()> {
    let mut pages = bytes::Bytes::new();
    let mut peers = Vec::new();
    answer(|ask, question| match ask {
        "fill" => {
            let content = if field(question, "vm_like", Value::as_bool)? { Content::VmLike } else { Content::Incompressible };
            pages = content.image(field(question, "bytes", Value::as_u64)?, field(question, "seed", Value::as_u64)?).bytes();
            Ok(json!({ "bytes": pages.len() }))
        }
        "quinn" => plain_quinn::listen(pages.clone(), question),
        "quic" => super::quic::listen(pages.clone(), question, &mut peers),
        other => Err(format!("a server cannot '{other}'").into()),
    })
}
