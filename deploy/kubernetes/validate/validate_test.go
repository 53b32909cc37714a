// Package validate checks the output of kustomize and helm with Kubernetes' own code: each object is decoded strictly, defaulted and
// validated like at a create, and its pods meet the Pod Security Standard `restricted`. deploy/kubernetes/check makes the files and names
// their folder in MANIFESTS.
package validate

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	certmanager "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	_ "k8s.io/kubernetes/pkg/apis/apps/install"
	_ "k8s.io/kubernetes/pkg/apis/autoscaling/install"
	_ "k8s.io/kubernetes/pkg/apis/batch/install"
	"k8s.io/kubernetes/pkg/apis/core"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	_ "k8s.io/kubernetes/pkg/apis/networking/install"
	_ "k8s.io/kubernetes/pkg/apis/policy/install"
	"k8s.io/kubernetes/pkg/registry/apps/deployment"
	"k8s.io/kubernetes/pkg/registry/autoscaling/horizontalpodautoscaler"
	"k8s.io/kubernetes/pkg/registry/batch/job"
	"k8s.io/kubernetes/pkg/registry/core/configmap"
	"k8s.io/kubernetes/pkg/registry/core/namespace"
	"k8s.io/kubernetes/pkg/registry/core/pod"
	"k8s.io/kubernetes/pkg/registry/core/service"
	"k8s.io/kubernetes/pkg/registry/core/serviceaccount"
	"k8s.io/kubernetes/pkg/registry/networking/networkpolicy"
	"k8s.io/kubernetes/pkg/registry/policy/poddisruptionbudget"
	"k8s.io/pod-security-admission/admission"
	psaapi "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/yaml"
)

// What the API server does with each kind at a create.
var strategies = map[string]rest.RESTCreateStrategy{
	"ConfigMap":               configmap.Strategy,
	"Deployment":              deployment.Strategy,
	"HorizontalPodAutoscaler": horizontalpodautoscaler.Strategy,
	"Job":                     job.Strategy,
	"Namespace":               namespace.Strategy,
	"NetworkPolicy":           networkpolicy.Strategy,
	"Pod":                     pod.Strategy,
	"PodDisruptionBudget":     poddisruptionbudget.Strategy,
	"Service":                 service.Strategy,
	"ServiceAccount":          serviceaccount.Strategy,
}

// Kinds of operators, by their own types: a field that they do not have is an error.
var resources = map[string]func() any{
	"Certificate":    func() any { return &certmanager.Certificate{} },
	"PodMonitor":     func() any { return &monitoring.PodMonitor{} },
	"PrometheusRule": func() any { return &monitoring.PrometheusRule{} },
}

var codecs = serializer.NewCodecFactory(legacyscheme.Scheme, serializer.EnableStrict)

// create returns the API server's errors for this object, and the object as it would be stored; nil for an operator's kind.
func create(document []byte) (runtime.Object, error) {
	var kind metav1.TypeMeta
	if err := yaml.Unmarshal(document, &kind); err != nil {
		return nil, err
	}
	if resource, known := resources[kind.Kind]; known {
		return nil, yaml.UnmarshalStrict(document, resource())
	}
	strategy, known := strategies[kind.Kind]
	if !known {
		return nil, fmt.Errorf("nothing here knows the kind %q", kind.Kind)
	}
	object, _, err := codecs.UniversalDecoder().Decode(document, nil, nil)
	if err != nil {
		return nil, err
	}
	accessor, err := meta.Accessor(object)
	if err != nil {
		return nil, err
	}
	if accessor.GetNamespace() == "" && strategy.NamespaceScoped() {
		accessor.SetNamespace("default")
	}
	version := kind.GroupVersionKind().GroupVersion()
	ctx := request.WithRequestInfo(request.WithNamespace(context.Background(), accessor.GetNamespace()), &request.RequestInfo{
		IsResourceRequest: true, Verb: "create", APIGroup: version.Group, APIVersion: version.Version, Namespace: accessor.GetNamespace(),
	})
	if service, is := object.(*core.Service); is && service.Spec.ClusterIP == core.ClusterIPNone {
		// The address allocator does this before the validation.
		service.Spec.ClusterIPs = []string{core.ClusterIPNone}
	}
	rest.FillObjectMetaSystemFields(accessor)
	if err := rest.BeforeCreate(strategy, ctx, object); err != nil {
		return nil, err
	}
	if warnings := strategy.WarningsOnCreate(ctx, object); len(warnings) > 0 {
		return nil, fmt.Errorf("warnings: %s", strings.Join(warnings, "; "))
	}
	stored, err := legacyscheme.Scheme.ConvertToVersion(object, version)
	if err != nil {
		return nil, err
	}
	if podMeta, spec, err := (admission.DefaultPodSpecExtractor{}).ExtractPodSpec(stored); err == nil && spec != nil {
		evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
		if err != nil {
			return nil, err
		}
		restricted := psaapi.LevelVersion{Level: psaapi.LevelRestricted, Version: psaapi.LatestVersion()}
		if found := policy.AggregateCheckResults(evaluator.EvaluatePod(restricted, podMeta, spec)); !found.Allowed {
			return nil, fmt.Errorf("not restricted: %s", found.ForbiddenDetail())
		}
	}
	return stored, nil
}

func documents(t *testing.T, file string) [][]byte {
	t.Helper()
	folder := os.Getenv("MANIFESTS")
	if folder == "" {
		t.Fatal("MANIFESTS names no folder: run deploy/kubernetes/check")
	}
	text, err := os.ReadFile(filepath.Join(folder, file))
	if err != nil {
		t.Fatal(err)
	}
	var found [][]byte
	for _, document := range regexp.MustCompile(`(?m)^---.*\n`).Split(string(text), -1) {
		if regexp.MustCompile(`(?m)^[a-z]`).MatchString(document) {
			found = append(found, []byte(document))
		}
	}
	return found
}

func files(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(os.Getenv("MANIFESTS"), "*.yaml"))
	if err != nil || len(paths) < 8 {
		t.Fatalf("%d files in MANIFESTS (%v): run deploy/kubernetes/check", len(paths), err)
	}
	for at, path := range paths {
		paths[at] = filepath.Base(path)
	}
	return paths
}

func TestKubernetesTakesEveryObject(t *testing.T) {
	for _, file := range files(t) {
		for _, document := range documents(t, file) {
			if _, err := create(document); err != nil {
				t.Errorf("%s: %v\n%.200s", file, err, document)
			}
		}
	}
}

// A check that accepts everything proves nothing.
func TestWhatIsWrongIsFound(t *testing.T) {
	for _, wrong := range []struct{ file, old, new, says string }{
		{"base.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFileSystem: true", `unknown field`},
		{"base.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot != true"},
		{"base.yaml", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "allowPrivilegeEscalation != false"},
		{"base.yaml", "mountPath: /etc/byok-gate/tls", "mountPath: /etc/byok-gate/config", "must be unique"},
		{"base.yaml", "targetPort: grpc", "targetPort: a-name-of-sixteen", "must be no more than 15 characters"},
		{"base.yaml", "name: byok-gate\n        ports:", "name: Byok_Gate\n        ports:", "RFC 1123"},
		{"base.yaml", "maxReplicas: 6", "maxReplicas: 1", "must be greater than or equal to `minReplicas`"},
		{"base.yaml", "cidr: 0.0.0.0/0", "cidr: 0.0.0.0/99", "must be a valid CIDR"},
		{"init-gate.yaml", "operator: NotIn", "operator: NotWithin", "Unsupported value"},
		{"init-gate.yaml", "containerName: byok-gate", "containerName: nobody", "must be one of the container or initContainer names"},
		{"operators.yaml", "podMetricsEndpoints:", "podMetricEndpoints:", "unknown field"},
		{"operators.yaml", "rotationPolicy: Always", "rotation: Always", "unknown field"},
	} {
		found := 0
		for _, document := range documents(t, wrong.file) {
			broken := bytes.Replace(document, []byte(wrong.old), []byte(wrong.new), 1)
			if bytes.Equal(broken, document) {
				continue
			}
			found++
			if _, err := create(broken); err == nil || !strings.Contains(err.Error(), wrong.says) {
				t.Errorf("%s with %q: want %q, got %v", wrong.file, wrong.new, wrong.says, err)
			}
		}
		if found == 0 {
			t.Errorf("%s has no %q", wrong.file, wrong.old)
		}
	}
}

// Exit 10 is a denial that only another secret can fix, 11 a retryable one, 1 a fault of the gate.
func TestADenialIsNotRestartedAndARetryableOneIs(t *testing.T) {
	gates := 0
	for _, file := range []string{"sidecar.yaml", "init-gate.yaml", "exec.yaml"} {
		for _, document := range documents(t, file) {
			object, err := create(document)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			workspace, isPod := object.(*corev1.Pod)
			if !isPod {
				continue
			}
			for _, container := range slices.Concat(workspace.Spec.InitContainers, workspace.Spec.Containers) {
				if !slices.Contains(slices.Concat(container.Command, container.Args), "exec") {
					continue
				}
				gates++
				for code, want := range map[int32]bool{0: false, 1: true, 10: false, 11: true, 137: true} {
					if got := podutil.ContainerShouldRestart(container, workspace.Spec, code); got != want {
						t.Errorf("%s: %s restarted after exit %d: %t", workspace.Name, container.Name, code, got)
					}
				}
			}
		}
	}
	if gates != 3 {
		t.Errorf("%d containers run `exec`, not 3", gates)
	}
	for _, document := range documents(t, "init-gate.yaml") {
		if object, _ := create(document); object != nil {
			if workspace, isJob := object.(*batchv1.Job); isJob {
				rule := workspace.Spec.PodFailurePolicy.Rules[0]
				if rule.Action != batchv1.PodFailurePolicyActionFailJob || !reflect.DeepEqual(rule.OnExitCodes.Values, []int32{10}) {
					t.Errorf("the Job goes on after a denial: %v", rule)
				}
				return
			}
		}
	}
	t.Error("init-gate.yaml has no Job")
}

// object is a document as plain data.
func object(t *testing.T, document []byte) *unstructured.Unstructured {
	t.Helper()
	object := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(document, &object.Object); err != nil {
		t.Fatal(err)
	}
	return object
}

// plain returns the objects of a file by kind and name, without the differences between helm and kustomize: helm's labels, the hash of
// the settings (an annotation there, a part of the ConfigMap's name here), the namespace, and the layout of YAML within a ConfigMap.
func plain(t *testing.T, file string) map[string]any {
	t.Helper()
	found := map[string]any{}
	for _, document := range documents(t, file) {
		document = regexp.MustCompile(`(byok-gate-config)-[0-9a-z]{10}\b`).ReplaceAll(document, []byte("$1"))
		object := object(t, document)
		if object.GetKind() == "Namespace" {
			continue
		}
		object.SetNamespace("")
		clean(object.Object)
		if data, held, _ := unstructured.NestedStringMap(object.Object, "data"); held && object.GetKind() == "ConfigMap" {
			parsed := map[string]any{}
			for name, text := range data {
				var tree any
				if err := yaml.Unmarshal([]byte(text), &tree); err != nil {
					t.Fatal(err)
				}
				parsed[name] = tree
			}
			object.Object["data"] = parsed
		}
		found[object.GetKind()+"/"+object.GetName()] = object.Object
	}
	return found
}

func clean(value any) {
	switch value := value.(type) {
	case map[string]any:
		for _, name := range []string{"app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart", "checksum/config"} {
			delete(value, name)
		}
		for _, below := range value {
			clean(below)
		}
	case []any:
		for _, below := range value {
			clean(below)
		}
	}
}

func TestTheChartMakesWhatKustomizeMakes(t *testing.T) {
	for chart, overlay := range map[string]string{"chart.yaml": "base.yaml", "chart-central.yaml": "central.yaml"} {
		ours, theirs := plain(t, chart), plain(t, overlay)
		for name, want := range theirs {
			if !reflect.DeepEqual(ours[name], want) {
				is, _ := yaml.Marshal(ours[name])
				should, _ := yaml.Marshal(want)
				t.Errorf("%s of %s is not that of %s\n%s", name, chart, overlay, difference(string(is), string(should)))
			}
			delete(ours, name)
		}
		for name := range ours {
			t.Errorf("%s has %s, %s has not", chart, name, overlay)
		}
	}
}

// difference are the lines that only one of the two has.
func difference(is, should string) string {
	var lines strings.Builder
	for _, side := range []struct{ sign, one, other string }{{"- ", is, should}, {"+ ", should, is}} {
		for line := range strings.SplitSeq(side.one, "\n") {
			if !slices.Contains(strings.Split(side.other, "\n"), line) {
				fmt.Fprintf(&lines, "%s%s\n", side.sign, line)
			}
		}
	}
	return lines.String()
}

// Selectors match the gate's pods, and those of no other release.
func TestSelectorsFindThePods(t *testing.T) {
	paths := map[string][]string{
		"Service": {"spec", "selector"}, "PodDisruptionBudget": {"spec", "selector", "matchLabels"},
		"NetworkPolicy": {"spec", "podSelector", "matchLabels"}, "PodMonitor": {"spec", "selector", "matchLabels"},
	}
	for _, file := range files(t) {
		var pods labels.Set
		for _, document := range documents(t, file) {
			if object := object(t, document); object.GetKind() == "Deployment" {
				pods, _, _ = unstructured.NestedStringMap(object.Object, "spec", "template", "metadata", "labels")
				spread, _, _ := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "topologySpreadConstraints")
				if len(spread) != 2 {
					t.Errorf("%s: spread over %d topologies, not 2", file, len(spread))
				}
				for _, constraint := range spread {
					selector, _, _ := unstructured.NestedStringMap(constraint.(map[string]any), "labelSelector", "matchLabels")
					if len(selector) == 0 || !labels.SelectorFromSet(selector).Matches(pods) {
						t.Errorf("%s: a spread of %v, pods of %v", file, selector, pods)
					}
				}
			}
		}
		for _, document := range documents(t, file) {
			object := object(t, document)
			path, selects := paths[object.GetKind()]
			if !selects || pods == nil {
				continue
			}
			selector, _, _ := unstructured.NestedStringMap(object.Object, path...)
			if len(selector) == 0 || !labels.SelectorFromSet(selector).Matches(pods) {
				t.Errorf("%s: %s selects %v, pods have %v", file, object.GetKind(), selector, pods)
			}
		}
	}
}
