//! Who a job runs as: `/etc/passwd` and `/etc/group` read directly, so that no name service is ever asked.

use crate::fail::{Fail, Outcome};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub name: String,
    pub home: String,
}

/// Resolve "name", "uid", "name:group" or "uid:gid" against the two files' texts.
pub fn resolve(spec: &str, passwd: &str, group: &str) -> Outcome<Ids> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (spec, None),
    };
    let mut ids = find_user(user, passwd)
        .or_else(|| {
            let uid = if user == "root" {
                0
            } else {
                user.parse().ok()?
            }; // an image may have no users at all
            let home = if uid == 0 { "/root" } else { "/" };
            Some(Ids {
                uid,
                gid: uid,
                groups: vec![],
                name: user.to_string(),
                home: home.to_string(),
            })
        })
        .ok_or_else(|| Fail::bad(format!("no such user in the guest: {user}")))?;
    match wanted_group {
        Some(g) => {
            ids.gid = find_group(g, group)
                .ok_or_else(|| Fail::bad(format!("no such group in the guest: {g}")))?
        }
        None => ids.groups = groups_of(&ids.name, group),
    }
    if !ids.groups.contains(&ids.gid) {
        ids.groups.insert(0, ids.gid);
    }
    Ok(ids)
}

fn find_user(user: &str, passwd: &str) -> Option<Ids> {
    passwd.lines().find_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        if f.len() < 6 || !(f[0] == user || f[2] == user) {
            return None;
        }
        let home = if f[5].is_empty() { "/" } else { f[5] };
        let (uid, gid) = (f[2].parse().ok()?, f[3].parse().ok()?);
        Some(Ids {
            uid,
            gid,
            groups: vec![],
            name: f[0].to_string(),
            home: home.to_string(),
        })
    })
}

fn find_group(name: &str, group: &str) -> Option<u32> {
    let listed = group.lines().find_map(|line| {
        let f: Vec<&str> = line.split(':').collect();
        if f.len() >= 3 && f[0] == name {
            f[2].parse().ok()
        } else {
            None
        }
    });
    listed.or_else(|| name.parse().ok())
}

fn groups_of(user: &str, group: &str) -> Vec<u32> {
    group
        .lines()
        .filter_map(|line| {
            let f: Vec<&str> = line.split(':').collect();
            if f.len() >= 4 && f[3].split(',').any(|m| m == user) {
                f[2].parse().ok()
            } else {
                None
            }
        })
        .take(64)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/bash\nada:x:1000:1000::/home/ada:/bin/sh\nbroken line\n";
    const GROUP: &str = "root:x:0:\nada:x:1000:\nvideo:x:44:bob,ada\nwheel:x:10:ada\n";

    #[test]
    fn by_name_number_and_group() {
        let ada = resolve("ada", PASSWD, GROUP).unwrap();
        assert_eq!(
            (ada.uid, ada.gid, ada.home.as_str()),
            (1000, 1000, "/home/ada")
        );
        assert_eq!(ada.groups, vec![1000, 44, 10]);
        assert_eq!(resolve("1000", PASSWD, GROUP).unwrap(), ada);
        let v = resolve("ada:video", PASSWD, GROUP).unwrap();
        assert_eq!((v.gid, v.groups), (44, vec![44]));
        let n = resolve("7:8", PASSWD, GROUP).unwrap();
        assert_eq!((n.uid, n.gid, n.home.as_str()), (7, 8, "/"));
        assert_eq!(resolve("0", "", "").unwrap().home, "/root");
        assert_eq!(resolve("root", "", "").unwrap().uid, 0);
    }

    #[test]
    fn unknown_names_are_refused() {
        assert_eq!(resolve("eve", PASSWD, GROUP).unwrap_err().kind, "bad_input");
        assert_eq!(
            resolve("ada:nope", PASSWD, GROUP).unwrap_err().kind,
            "bad_input"
        );
        assert_eq!(resolve("", PASSWD, GROUP).unwrap_err().kind, "bad_input");
    }
}
