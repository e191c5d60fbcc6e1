//! `cargo xtask layers`: which crate may use which.
//!
//! The table is the project's architecture. A crate that is not in it fails the check, so that a new one has
//! to say where it stands.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cargo_metadata::{CargoOpt, DependencyKind, Metadata, MetadataCommand};

use crate::steps::{self, Result};

/// What one crate of the workspace may know.
struct Rule {
    name: &'static str,
    /// The crates of the workspace that it may depend on.
    may_use: May,
    /// What must not be reached over any number of dependencies.
    never: Never,
    /// Who may depend on it.
    used_by: Users,
}

enum May {
    Only(&'static [&'static str]),
    Anything,
}

enum Never {
    These(&'static [&'static str]),
    /// The standard library alone.
    Everything,
}

#[derive(PartialEq, Eq)]
enum Users {
    Anybody,
    /// Only tests: it stands in no normal dependencies.
    TestsOnly,
    /// It stands in no dependencies of any kind.
    Nobody,
}

/// Normal dependencies if not said otherwise: a test may use what it likes.
const RULES: [Rule; 9] = [
    Rule {
        name: "leasehold-domain",
        may_use: May::Only(&[]),
        never: Never::These(&[
            "diesel",
            "bb8",
            "tokio-postgres",
            "axum",
            "tower",
            "hyper",
            "utoipa",
        ]),
        used_by: Users::Anybody,
    },
    Rule {
        name: "leasehold-storage",
        may_use: May::Only(&["leasehold-domain"]),
        never: Never::These(&["axum", "tower", "utoipa"]),
        used_by: Users::Anybody,
    },
    Rule {
        name: "leasehold-http",
        may_use: May::Only(&["leasehold-domain"]),
        never: Never::These(&["diesel", "bb8", "tokio-postgres"]),
        used_by: Users::Anybody,
    },
    Rule {
        name: "leasehold-embedded",
        may_use: May::Only(&[]),
        never: Never::Everything,
        used_by: Users::Anybody,
    },
    Rule {
        name: "leasehold-conformance",
        may_use: May::Only(&["leasehold-domain"]),
        never: Never::These(&[]),
        used_by: Users::TestsOnly,
    },
    Rule {
        name: "leasehold-server",
        may_use: May::Only(&[
            "leasehold-domain",
            "leasehold-storage",
            "leasehold-http",
            "leasehold-embedded",
        ]),
        never: Never::These(&[]),
        used_by: Users::Anybody,
    },
    Rule {
        name: "xtask",
        may_use: May::Only(&["leasehold-embedded"]),
        never: Never::These(&[]),
        used_by: Users::Nobody,
    },
    Rule {
        name: "leasehold-system-tests",
        may_use: May::Anything,
        never: Never::These(&[]),
        used_by: Users::Nobody,
    },
    Rule {
        name: "leasehold-bench",
        may_use: May::Anything,
        never: Never::These(&[]),
        used_by: Users::Nobody,
    },
];

/// Who depends on whom, by the names of packages. Versions of a package are one: a rule means them all.
#[derive(Debug, Default)]
struct Graph {
    members: BTreeSet<String>,
    normal: BTreeMap<String, BTreeSet<String>>,
    /// Dependencies for tests and build scripts.
    other: BTreeMap<String, BTreeSet<String>>,
}

/// The `layers` command.
pub(crate) fn check() -> Result {
    let metadata = MetadataCommand::new()
        .current_dir(steps::root())
        .features(CargoOpt::AllFeatures)
        .other_options(vec!["--locked".to_owned()])
        .exec()?;
    let found = violations(&Graph::of(&metadata)?, &RULES);
    if found.is_empty() {
        println!(
            "{} crates, each knows only what it may",
            metadata.workspace_members.len()
        );
        return Ok(());
    }
    Err(format!("\n  {}", found.join("\n  ")).into())
}

impl Graph {
    fn of(metadata: &Metadata) -> Result<Self> {
        let resolved = metadata
            .resolve
            .as_ref()
            .ok_or("cargo metadata resolved nothing")?;
        let mut graph = Self::default();
        for node in &resolved.nodes {
            let name = metadata[&node.id].name.to_string();
            if metadata.workspace_members.contains(&node.id) {
                graph.members.insert(name.clone());
            }
            for dependency in &node.deps {
                let used = metadata[&dependency.pkg].name.to_string();
                for kind in &dependency.dep_kinds {
                    let edges = if kind.kind == DependencyKind::Normal {
                        &mut graph.normal
                    } else {
                        &mut graph.other
                    };
                    edges.entry(name.clone()).or_default().insert(used.clone());
                }
            }
        }
        Ok(graph)
    }

    fn normal_of<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        self.normal.get(name).into_iter().flatten().map(String::as_str)
    }

    /// The shortest way over normal dependencies.
    fn path<'a>(&'a self, from: &'a str, to: &str) -> Option<Vec<&'a str>> {
        let mut came_from: BTreeMap<&str, Option<&str>> = BTreeMap::from([(from, None)]);
        let mut next = VecDeque::from([from]);
        while let Some(here) = next.pop_front() {
            if here == to {
                let mut path = vec![here];
                while let Some(Some(before)) = path.last().and_then(|last| came_from.get(last)) {
                    path.push(before);
                }
                path.reverse();
                return Some(path);
            }
            for used in self.normal_of(here) {
                if !came_from.contains_key(used) {
                    came_from.insert(used, Some(here));
                    next.push_back(used);
                }
            }
        }
        None
    }
}

/// Every broken rule, one line each.
fn violations(graph: &Graph, rules: &[Rule]) -> Vec<String> {
    let mut found = Vec::new();
    for member in &graph.members {
        match rules.iter().find(|rule| rule.name == member) {
            Some(rule) => {
                found.extend(uses_too_much(graph, rule));
                found.extend(sees_too_much(graph, rule));
                found.extend(is_used_too_much(graph, rule));
            }
            None => found.push(format!(
                "{member} has no rule: say in xtask/src/layers.rs what it may know"
            )),
        }
    }
    found
}

fn uses_too_much(graph: &Graph, rule: &Rule) -> Vec<String> {
    let May::Only(allowed) = rule.may_use else {
        return Vec::new();
    };
    graph
        .normal_of(rule.name)
        .filter(|used| graph.members.contains(*used) && !allowed.contains(used))
        .map(|used| {
            let allowed = if allowed.is_empty() {
                "none"
            } else {
                &allowed.join(", ")
            };
            format!("{} uses {used}; of the workspace it may use {allowed}", rule.name)
        })
        .collect()
}

fn sees_too_much(graph: &Graph, rule: &Rule) -> Vec<String> {
    let forbidden: Vec<&str> = match rule.never {
        Never::These(names) => names.to_vec(),
        Never::Everything => graph.normal_of(rule.name).collect(),
    };
    let paths = forbidden
        .into_iter()
        .filter_map(|name| Some((name, graph.path(rule.name, name)?)));
    paths
        .map(|(name, path)| format!("{} must never see {name}: {}", rule.name, path.join(" -> ")))
        .collect()
}

fn is_used_too_much(graph: &Graph, rule: &Rule) -> Vec<String> {
    let users = |edges: &BTreeMap<String, BTreeSet<String>>| {
        edges
            .iter()
            .filter(|(_, used)| used.contains(rule.name))
            .map(|(user, _)| user.clone())
            .collect::<Vec<_>>()
    };
    let mut wrong = if rule.used_by == Users::Anybody {
        Vec::new()
    } else {
        users(&graph.normal)
    };
    if rule.used_by == Users::Nobody {
        wrong.extend(users(&graph.other));
    }
    let allowed = if rule.used_by == Users::TestsOnly {
        "only tests may"
    } else {
        "nobody may"
    };
    wrong
        .into_iter()
        .map(|user| format!("{user} uses {}, but {allowed}", rule.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Edges as `user -> used`, dashed for those of tests: `user ~> used`. All `leasehold-…` are members.
    fn graph(edges: &[&str]) -> Graph {
        let mut graph = Graph::default();
        for edge in edges {
            let words: Vec<&str> = edge.split(' ').collect();
            let [user, arrow, used] = words[..] else {
                panic!("{edge}")
            };
            for name in [user, used] {
                if name.starts_with("leasehold-") || name == "xtask" {
                    graph.members.insert(name.to_owned());
                }
            }
            let edges = if arrow == "->" {
                &mut graph.normal
            } else {
                &mut graph.other
            };
            edges.entry(user.to_owned()).or_default().insert(used.to_owned());
        }
        graph
    }

    fn found(edges: &[&str]) -> Vec<String> {
        violations(&graph(edges), &RULES)
    }

    const ALLOWED: [&str; 11] = [
        "leasehold-server -> leasehold-storage",
        "leasehold-server -> leasehold-http",
        "leasehold-server -> leasehold-embedded",
        "leasehold-storage -> leasehold-domain",
        "leasehold-storage -> diesel",
        "leasehold-storage ~> leasehold-conformance",
        "leasehold-conformance -> leasehold-domain",
        "leasehold-http -> axum",
        "axum -> tower",
        "xtask -> leasehold-embedded",
        "leasehold-system-tests -> leasehold-server",
    ];

    #[test]
    fn what_is_allowed_is_not_reported() {
        assert_eq!(found(&ALLOWED), Vec::<String>::new());
    }

    #[track_caller]
    fn one_more(edge: &[&str], reported: &[&str]) {
        let edges: Vec<&str> = ALLOWED.iter().chain(edge).copied().collect();
        assert_eq!(found(&edges), reported);
    }

    #[test]
    fn a_crate_of_the_workspace_that_is_not_allowed_is_reported() {
        one_more(
            &["leasehold-storage -> leasehold-http"],
            &[
                "leasehold-storage uses leasehold-http; of the workspace it may use leasehold-domain",
                "leasehold-storage must never see axum: leasehold-storage -> leasehold-http -> axum",
                "leasehold-storage must never see tower: leasehold-storage -> leasehold-http -> axum -> tower",
            ],
        );
        one_more(
            &["leasehold-domain -> leasehold-embedded"],
            &["leasehold-domain uses leasehold-embedded; of the workspace it may use none"],
        );
    }

    #[test]
    fn an_outside_crate_is_reported_with_the_way_to_it() {
        one_more(
            &[
                "leasehold-http -> pretty-errors",
                "pretty-errors -> sql-errors",
                "sql-errors -> tokio-postgres",
            ],
            &["leasehold-http must never see tokio-postgres: \
               leasehold-http -> pretty-errors -> sql-errors -> tokio-postgres"],
        );
    }

    #[test]
    fn a_forbidden_crate_for_tests_is_fine() {
        one_more(&["leasehold-http ~> tokio-postgres"], &[]);
    }

    #[test]
    fn embedded_needs_nothing() {
        one_more(
            &["leasehold-embedded -> libc"],
            &["leasehold-embedded must never see libc: leasehold-embedded -> libc"],
        );
    }

    #[test]
    fn conformance_is_for_tests_and_the_tests_are_for_nobody() {
        one_more(
            &["leasehold-server -> leasehold-conformance"],
            &[
                "leasehold-server uses leasehold-conformance, but only tests may",
                "leasehold-server uses leasehold-conformance; of the workspace it may use leasehold-domain, leasehold-storage, \
                 leasehold-http, leasehold-embedded",
            ],
        );
        one_more(
            &["leasehold-http ~> leasehold-system-tests"],
            &["leasehold-http uses leasehold-system-tests, but nobody may"],
        );
    }

    #[test]
    fn a_crate_without_a_rule_is_reported() {
        one_more(
            &["leasehold-server ~> leasehold-novelty"],
            &["leasehold-novelty has no rule: say in xtask/src/layers.rs what it may know"],
        );
    }

    #[test]
    fn a_circle_ends() {
        one_more(&["tower -> axum"], &[]);
    }
}
