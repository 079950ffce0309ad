//! Where a file's pages are mapped in another process: read from `/proc/PID/maps`, nothing else.

use std::path::Path;

use crate::sys::PAGE;

/// One mapped piece of the RAM file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: u64,
    pub first_page: usize,
    pub pages: usize,
    /// Mapped shared: its written pages are the file's own, not private ones.
    pub shared: bool,
}

/// What a line of `/proc/PID/maps` must be to count as RAM.
pub struct Wanted<'a> {
    pub path: &'a Path,
    pub device: u64,
    pub inode: u64,
    pub pages: usize,
}

/// The mapped pieces of one file, by path or, should the file have been renamed, by device and inode. Some file
/// systems (overlayfs, btrfs) show another device here than `stat` does, hence both.
pub fn find_segments(maps: &str, wanted: &Wanted) -> Vec<Segment> {
    let mut out = Vec::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.splitn(6, ' ').collect();
        let [range, access, offset, device, inode, rest] = fields[..] else {
            continue;
        };
        let path = rest.trim_start().trim_end_matches(" (deleted)");
        let same_file = wanted.inode != 0
            && device_number(device) == Some(wanted.device)
            && inode.parse() == Ok(wanted.inode);
        if Path::new(path) != wanted.path && !same_file {
            continue;
        }
        let Some((from, to)) = range.split_once('-') else {
            continue;
        };
        let hex = |text| u64::from_str_radix(text, 16);
        if let (Ok(from), Ok(to), Ok(offset)) = (hex(from), hex(to), hex(offset)) {
            let first_page = offset as usize / PAGE;
            let pages = ((to - from) as usize / PAGE).min(wanted.pages.saturating_sub(first_page));
            out.push(Segment {
                address: from,
                first_page,
                pages,
                shared: access.ends_with('s'),
            });
        }
    }
    out.sort_by_key(|s| s.first_page);
    out
}

fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let hex = |part| u32::from_str_radix(part, 16).ok();
    Some(libc::makedev(hex(major)?, hex(minor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000004000 rw-p 00000000 00:19 77 /dev/shm/a b/ram (deleted)
7f0000004000-7f0000006000 rw-p 00004000 00:19 77 /dev/shm/a b/ram (deleted)
7f0000010000-7f0000011000 rw-p 00000000 00:00 0 
7f0000020000-7f0000022000 r-xp 00000000 fe:00 12 /usr/bin/qemu
";

    #[test]
    fn segments_are_found_by_path_or_by_inode() {
        let by_path = Wanted {
            path: Path::new("/dev/shm/a b/ram"),
            device: 1,
            inode: 1,
            pages: 6,
        };
        let both = vec![
            Segment {
                address: 0x7f00_0000_0000,
                first_page: 0,
                pages: 4,
                shared: false,
            },
            Segment {
                address: 0x7f00_0000_4000,
                first_page: 4,
                pages: 2,
                shared: false,
            },
        ];
        assert_eq!(find_segments(MAPS, &by_path), both);
        let moved = Wanted {
            path: Path::new("/new"),
            device: libc::makedev(0, 0x19),
            inode: 77,
            pages: 6,
        };
        assert_eq!(find_segments(MAPS, &moved), both);
        let other = Wanted {
            path: Path::new("/new"),
            device: 1,
            inode: 77,
            pages: 6,
        };
        assert!(find_segments(MAPS, &other).is_empty());
    }
}
