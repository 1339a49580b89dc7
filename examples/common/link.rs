//! A link for an example to run over: as far away, slow and lossy as its user asks for.
//!
//! Role: the options `--rtt`, `--jitter`, `--rate` and `--loss`. Neighbours: each example that opens a connection flattens them into its own; [`LinkShape`] reads and checks them, and shapes
//! datagrams under the QUIC socket of the end that connects. Invariants: nothing asked for is the plain socket; what is handed to another process is read there as it was here.

#![allow(dead_code, reason = "each example uses its own part")]

use clap::Args;
use pageferry::{LinkShape, TransportOptions};
use std::time::Duration;

// No documentation of its own: clap would take it for the example's.
#[derive(Args, Clone, Debug, Default)]
pub struct Link {
    /// Round trip of the link between both ends, beside its own, such as 25ms
    #[arg(long, global = true, value_name = "TIME", value_parser = LinkShape::parse_duration)]
    rtt: Option<Duration>,
    /// Each datagram takes up to so much longer, such as 2ms
    #[arg(long, global = true, value_name = "TIME", value_parser = LinkShape::parse_duration)]
    jitter: Option<Duration>,
    /// What the link carries in each direction, such as 100Mbit/s
    #[arg(long, global = true, value_name = "RATE", value_parser = LinkShape::parse_rate)]
    rate: Option<u64>,
    /// Share of the datagrams that is lost, such as 0.1%
    #[arg(long, global = true, value_name = "SHARE", value_parser = LinkShape::parse_share)]
    loss: Option<f64>,
}

impl Link {
    /// The same, with this round trip unless one was asked for.
    pub fn or_rtt(mut self, rtt: Duration) -> Link {
        self.rtt.get_or_insert(rtt);
        self
    }

    pub fn rtt(&self) -> Duration {
        self.rtt.unwrap_or_default()
    }

    /// For the end that connects.
    pub fn transport(&self) -> TransportOptions {
        TransportOptions { shape: self.shape(), ..TransportOptions::default() }
    }

    /// `None` if nothing was asked for.
    fn shape(&self) -> Option<LinkShape> {
        let asked = self.rtt.is_some() || self.jitter.is_some() || self.rate.is_some() || self.loss.is_some();
        asked.then(|| LinkShape {
            rtt: self.rtt(),
            jitter: self.jitter.unwrap_or_default(),
            bytes_s: self.rate,
            loss: self.loss.unwrap_or_default(),
            ..LinkShape::default()
        })
    }

    /// The options that say the same to a process that this one starts.
    pub fn arguments(&self) -> Vec<String> {
        let time = |time: Duration| format!("{}ns", time.as_nanos());
        let options = [
            ("--rtt", self.rtt.map(time)),
            ("--jitter", self.jitter.map(time)),
            ("--rate", self.rate.map(|bytes_s| format!("{bytes_s}B/s"))),
            ("--loss", self.loss.map(|share| format!("{}%", share * 100.0))),
        ];
        options.into_iter().filter_map(|(name, value)| Some([name.to_owned(), value?])).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        link: Link,
    }

    fn read(arguments: &[String]) -> Link {
        Command::try_parse_from([&["example".to_owned()], arguments].concat()).unwrap().link
    }

    #[test]
    fn what_a_started_process_is_told_is_what_was_asked_for() {
        let asked = ["--rtt=25ms", "--jitter=1.5ms", "--rate=100Mbit/s", "--loss=0.1%"].map(str::to_owned);
        let (link, told) = (read(&asked), read(&read(&asked).arguments()));
        for shape in [link.shape().unwrap(), told.shape().unwrap()] {
            assert_eq!((shape.rtt, shape.jitter), (Duration::from_millis(25), Duration::from_micros(1500)));
            assert_eq!((shape.bytes_s, shape.loss), (Some(12_500_000), 0.001));
        }
    }

    #[test]
    fn nothing_asked_for_is_the_plain_socket() {
        let link = read(&[]);
        assert!(link.transport().shape.is_none() && link.arguments().is_empty());
        assert_eq!(link.clone().or_rtt(Duration::from_millis(10)).transport().shape.unwrap().rtt, Duration::from_millis(10));
    }
}
