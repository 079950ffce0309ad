//! The machine's network card, if it has one: address, route and name server are told on the kernel's command line, so that
//! no image needs a program for it. One plan for every machine: each has a network of its own behind its VMM.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use crate::fail::Fail;
use crate::init::await_path;
use crate::sys;

/// `ADDRESS/BITS,GATEWAY,NAMESERVER`.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    address: Ipv4Addr,
    mask: Ipv4Addr,
    gateway: Ipv4Addr,
    name_server: Ipv4Addr,
}

impl Plan {
    pub fn parse(text: &str) -> Result<Plan, Fail> {
        let wrong = || Fail::new("failed", format!("no plan of a network card: {text}"));
        let words: Vec<&str> = text.split(',').collect();
        let [own, gateway, name_server] = words[..] else {
            return Err(wrong());
        };
        let (address, bits) = own.split_once('/').ok_or_else(wrong)?;
        let bits: u32 = bits.parse().map_err(|_| wrong())?;
        if !(1..=32).contains(&bits) {
            return Err(wrong());
        }
        let ip = |word: &str| word.parse::<Ipv4Addr>().map_err(|_| wrong());
        Ok(Plan {
            address: ip(address)?,
            mask: Ipv4Addr::from(u32::MAX << (32 - bits)),
            gateway: ip(gateway)?,
            name_server: ip(name_server)?,
        })
    }
}

/// Bring the card up. A machine that was promised a card and has none is of no use: an error ends the boot.
pub fn up(plan: &Plan) -> Result<(), Fail> {
    await_path("/sys/class/net/eth0").map_err(|_| {
        let why = "no eth0 appeared: this guest kernel has no driver for the network card (CONFIG_VIRTIO_NET)";
        Fail::new("failed", why)
    })?;
    configure("eth0", plan).map_err(|e| Fail::io("eth0", &e))
}

fn configure(name: &str, plan: &Plan) -> io::Result<()> {
    // SAFETY: ifreq and rtentry are plain data, and all-zero is valid for a rtentry.
    unsafe {
        let (s, mut req) = sys::interface(name)?;
        for (call, address) in [
            (libc::SIOCSIFADDR, plan.address),
            (libc::SIOCSIFNETMASK, plan.mask),
        ] {
            req.ifr_ifru.ifru_addr = socket_address(address);
            sys::check(libc::ioctl(s.as_raw_fd(), call, &req))?;
        }
        req.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        sys::check(libc::ioctl(s.as_raw_fd(), libc::SIOCSIFFLAGS, &req))?;
        let mut route: libc::rtentry = std::mem::zeroed();
        let any = Ipv4Addr::UNSPECIFIED;
        (route.rt_dst, route.rt_genmask) = (socket_address(any), socket_address(any));
        route.rt_gateway = socket_address(plan.gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        sys::check(libc::ioctl(s.as_raw_fd(), libc::SIOCADDRT, &route)).map(drop)
    }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: a sockaddr_in has the size of a sockaddr and is plain data.
    unsafe {
        let mut out: libc::sockaddr_in = std::mem::zeroed();
        out.sin_family = libc::AF_INET as libc::sa_family_t;
        out.sin_addr.s_addr = u32::from(address).to_be();
        std::mem::transmute(out)
    }
}

/// What programs find in /etc/resolv.conf.
pub fn resolver(plan: Option<&Plan>) -> String {
    // No name server by default: a resolver that waits for nobody makes programs late.
    plan.map_or(String::new(), |p| format!("nameserver {}\n", p.name_server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_or_refused_whole() {
        let plan = Plan::parse("10.0.2.15/24,10.0.2.2,10.0.2.3").unwrap();
        assert_eq!(plan.mask, Ipv4Addr::new(255, 255, 255, 0));
        assert_eq!(resolver(Some(&plan)), "nameserver 10.0.2.3\n");
        assert_eq!(resolver(None), "");
        for wrong in [
            "",
            "10.0.2.15",
            "10.0.2.15/24",
            "10.0.2.15/24,10.0.2.2",
            "10.0.2.15,10.0.2.2,10.0.2.3",
            "10.0.2.15/33,10.0.2.2,10.0.2.3",
            "10.0.2.15/0,10.0.2.2,10.0.2.3",
            "a/24,10.0.2.2,10.0.2.3",
            "10.0.2.15/24,10.0.2.2,10.0.2.3,x",
        ] {
            assert!(Plan::parse(wrong).is_err(), "{wrong}");
        }
    }
}
