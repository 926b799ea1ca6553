"""One Flyte task a stage: open the artefacts, call the component, return the artefact."""
